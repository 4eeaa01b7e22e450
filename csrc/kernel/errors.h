// The one form of an error text: who, which argument, what rule, what was given, what to do; knows no torch.
#pragma once

#include <sstream>
#include <string>

namespace tlfast {

template <class Got>
std::string broken_rule(const std::string& who, const std::string& argument, const std::string& rule, const Got& got,
                        const std::string& remedy) {
  std::ostringstream text;
  text << who << ": " << argument << " must " << rule << ", got " << got << ". " << remedy;
  return text.str();
}

// Sizes as Python prints a list of them.
template <class Sizes>
std::string list_of(const Sizes& sizes) {
  std::ostringstream text;
  const char* between = "[";
  for (const auto size : sizes) {
    text << between << size;
    between = ", ";
  }
  text << (sizes.empty() ? "[]" : "]");
  return text.str();
}

}  // namespace tlfast
