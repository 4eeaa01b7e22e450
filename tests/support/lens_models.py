"""Small TransformerLens models without a download: whichever kinds the installed version can build."""

from __future__ import annotations

import warnings
from importlib import import_module

import torch
from torch import nn

N_LAYERS, WIDTH, HEADS, VOCAB, POSITIONS = 2, 16, 2, 23, 12

try:
    BUILDER = import_module("transformer_lens.model_bridge.sources._bridge_builder")
except ImportError:
    BUILDER = None


def hooked_transformer(kind=None, **more):
    """A HookedTransformer, or another kind of it; ImportError from 4.0 on."""
    lens = import_module("transformer_lens")
    config = lens.HookedTransformerConfig(
        n_layers=N_LAYERS, d_model=WIDTH, n_ctx=POSITIONS, d_head=WIDTH // HEADS, n_heads=HEADS, d_vocab=VOCAB,
        act_fn="gelu", normalization_type="LN", seed=0, device="cpu", **more,
    )  # fmt: skip
    return (kind or lens.HookedTransformer)(config)


def native_bridge(**more):
    """A TransformerBridge around TransformerLens' own small transformer; AttributeError before 4.0."""
    bridge = import_module("transformer_lens").TransformerBridge
    import_module("transformer_lens.model_bridge.sources")
    return bridge.boot_native(
        dict(n_layers=N_LAYERS, d_model=WIDTH, n_ctx=POSITIONS, d_head=WIDTH // HEADS, n_heads=HEADS, d_vocab=VOCAB,
             act_fn="gelu", normalization_type="LN", seed=0) | more
    )  # fmt: skip


def gpt2_bridge():
    """A TransformerBridge around a GPT-2 of Hugging Face; ImportError before 3.0."""
    bridges = import_module("transformer_lens.model_bridge")
    transformers = import_module("transformers")
    config = transformers.GPT2Config(
        n_layer=N_LAYERS, n_embd=WIDTH, n_head=HEADS, vocab_size=VOCAB, n_positions=POSITIONS,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    if BUILDER is None:  # 3.0 to 3.2.1 build a bridge only where they load a model; these are the steps
        mapped = bridges.sources.transformers.map_default_transformer_lens_config(config)
        own = import_module("transformer_lens.config").TransformerBridgeConfig.from_dict(vars(mapped))
        own.architecture, own.device = "GPT2LMHeadModel", "cpu"
        factory = import_module("transformer_lens.factories.architecture_adapter_factory").ArchitectureAdapterFactory
        adapter = factory.select_architecture_adapter(own)
        adapter.prepare_model(model)
        return bridges.TransformerBridge(model, adapter, None)
    return BUILDER.build_bridge_from_module(model, "GPT2LMHeadModel", hf_config=config, dtype=torch.float32)


def root_module():
    """A HookedRootModule of our own: a point, a point called twice, and a layer."""
    lens = import_module("transformer_lens.hook_points")
    root = getattr(import_module("transformer_lens"), "HookedRootModule", None) or lens.HookedRootModule

    class Small(root):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)
            self.hook_in, self.hook_twice, self.hook_out = (lens.HookPoint() for _ in range(3))
            self.setup()

        def forward(self, x):
            x = self.hook_in(self.layer(x))
            x = self.hook_twice(self.layer(x)) + self.hook_twice(x * 2).tanh()
            return self.hook_out(x).square().sum()

    return Small()


def usable(make):
    """Whether this TransformerLens can make such a model."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of being deprecated, before 4.0
            make()
    except (ImportError, AttributeError):
        return False
    return True


def tokens(batch=2, seed=1):
    return torch.randint(VOCAB, (batch, 7), generator=torch.Generator().manual_seed(seed))


def first_example(given):
    """The arguments of a call, positional or by keyword, for its first example alone."""
    if isinstance(given, dict):
        return {key: value[:1] if isinstance(value, torch.Tensor) else value for key, value in given.items()}
    return tuple(value[:1] if isinstance(value, torch.Tensor) else value for value in given)


def _caches_gradients(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache = make().run_with_cache(tokens(), return_type="loss", incl_bwd=True)[1]
    return any(name.endswith("_grad") for name in cache)


def _leaves_backward_hooks(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make()
    name, point = next(iter(model.hook_dict.items()))
    with model.hooks(bwd_hooks=[(name, lambda grad, hook: None)]):
        pass
    return bool(point.bwd_hooks)


MODELS = {make.__name__: make for make in (hooked_transformer, native_bridge, gpt2_bridge) if usable(make)}
# By what they do: bridges of 3.0 to 3.7 take incl_bwd=True and cache no gradient; those up to 3.2 lose track of hooks.
CACHING = {kind: make for kind, make in MODELS.items() if _caches_gradients(make)}
LEAKING = {kind: make for kind, make in MODELS.items() if _leaves_backward_hooks(make)}


def called_several_times(name):
    """Points of a HookedTransformer that q, k and v call each."""
    return name.endswith(("ln1.hook_scale", "ln1.hook_normalized"))


def state(model):
    """All that hooks and accelerations may change in a model, by the identity of what is there."""
    modules = {id(m): m for m in (model, *model.modules(), *getattr(model, "hook_dict", {}).values())}.values()
    lists = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    seen = []
    for module in modules:
        kept = sorted(vars(module))
        hooks = {name: list(map(id, getattr(module, name).values())) for name in lists}
        listed = [list(map(id, getattr(module, name, []))) for name in ("fwd_hooks", "bwd_hooks")]
        seen.append((id(module), kept, hooks, listed))
    return seen
