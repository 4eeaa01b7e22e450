// In which order threads run: one of those that can, chosen by a number that the tests set.
#pragma once

#include <bit>
#include <cstdint>

namespace simt {

class Order {
 public:
  // As in simt_set_order.
  explicit Order(int number = 0) : number_(number) {}

  // The same choices in every launch.
  void start() { state_ = uint64_t(number_); }

  // Whether a warp goes on as long as it can before another one does.
  bool warp_by_warp() const { return number_ > 2 && number_ % 2; }

  // One of the bits that are set.
  unsigned choose(uint32_t bits) {
    if (number_ == 0) return std::countr_zero(bits);
    if (number_ == 1) return 31 - std::countl_zero(bits);
    const unsigned from = draw() % 32;
    return (std::countr_zero(std::rotr(bits, int(from))) + from) % 32;
  }

 private:
  // Vigna's splitmix64: each seed gives another sequence, neighbours too.
  uint64_t draw() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

  int number_;
  uint64_t state_ = 0;
};

}  // namespace simt
