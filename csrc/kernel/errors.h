// The one form of an error text: who, which argument, what rule, what was given, what to do.
#pragma once

#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

namespace tlfast {

template <class Got>
std::string broken_rule(const std::string& who, const std::string& argument, const std::string& rule, const Got& got,
                        const std::string& remedy) {
  return c10::str(who, ": ", argument, " must ", rule, ", got ", got, ". ", remedy);
}

// Sizes as Python prints a list of them.
inline std::string list_of(c10::IntArrayRef sizes) { return c10::str("[", c10::Join(", ", sizes), "]"); }

}  // namespace tlfast
