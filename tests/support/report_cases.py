"""A dataset whose rows are known, and the report of one, parsed."""

import html.parser

import torch

from tlfast.dataset import FLAG_SATURATED, DatasetWriter, Example, Plan
from tlfast.report import write_report

PLAN = Plan(10, 4)


def make(out, points=("h.0", "h.1"), header=None, row_shape=(3,), units=(0, 1, 2), source="a.txt", spoil=None):
    """A dataset whose row r has the value r + 1 at the first point, twice that at the second, and so on."""
    columns = dict.fromkeys(points, (torch.float32, row_shape))
    writer = DatasetWriter(out, header=header or {}, columns=columns, plan=PLAN)
    for unit in (PLAN.unit(k) for k in units):
        rows = torch.arange(unit.start + 1.0, unit.stop + 1.0).reshape(-1, *[1] * len(row_shape))
        tensors = {point: (rows * (k + 1)).expand(len(unit), *row_shape).clone() for k, point in enumerate(points)}
        if spoil is not None:
            spoil(unit, tensors)
        examples = [Example(i, [i, i + 1], source, 10 * i, 2) for i in range(unit.start, unit.stop)]
        flags = [FLAG_SATURATED * (i == 5) for i in range(unit.start, unit.stop)]
        writer.write_unit(unit, tensors, examples, flags)
    return out


class Page(html.parser.HTMLParser):
    """Which tags and attributes a page has, and the text of it."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = set(), {}, ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.text += " "
        for name, value in attrs:
            self.attributes.setdefault(name, set()).add(value)

    def handle_data(self, data):
        self.text += data


def page_of(folder, **settings):
    """The report of a dataset, parsed."""
    return Page(write_report(folder, folder.parent / "page.html", **settings).read_text(encoding="utf-8"))
