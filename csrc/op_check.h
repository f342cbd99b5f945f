// One form for every error an op raises: the op, the argument, what was expected and what came. Messages are put
// together without iostreams, whose locale machinery does not survive every way of linking the C++ library.
#pragma once

#include <cstdio>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace farms_fast {

template <typename Part>
std::string message_part(const Part& part) {
  if constexpr (std::is_integral_v<Part>) {
    return std::to_string(part);
  } else if constexpr (std::is_floating_point_v<Part>) {
    char digits[32];
    std::snprintf(digits, sizeof digits, "%g", static_cast<double>(part));
    return digits;
  } else {
    return part;
  }
}

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw std::runtime_error((std::string("farms_fast.") + ... + message_part(parts)));
}

}  // namespace farms_fast

// The message's parts follow the argument's name: FARMS_CHECK(n > 0, "op", "arg", "expected a positive size, got ", n).
#define FARMS_CHECK(condition, op, argument, ...)                                           \
  do {                                                                                      \
    if (!(condition)) ::farms_fast::fail(op, ": argument '", argument, "': ", __VA_ARGS__); \
  } while (false)
