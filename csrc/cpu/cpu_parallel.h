// How the CPU ops share work out to threads. What a task computes never depends on which thread takes it, nor on how
// many there are: MKL runs on one thread everywhere, because with more it would cut its sums by their number.
#pragma once

#include <algorithm>
#include <cstdint>

#include "csrc/cpu/lapack.h"

namespace farms_fast {

// Floating-point operations, a millisecond's, below which the calling thread does all of them: waking others gains
// nothing, and where other processes keep the cores busy each barrier waits for a time slice.
constexpr double kLeastParallelWork = 4e7;

inline int64_t thread_count() { return std::max<int64_t>(1, torch::stable::get_num_threads()); }

// Runs body(begin, end) for parts of [0, count), a part to a thread. On one thread it is not a parallel loop to torch,
// so that loops within the body may be; within the others they run on the thread that they are in.
template <typename Body>
void on_threads(int64_t threads, int64_t count, const Body& body) {
  const auto part = [&](int64_t begin, int64_t end) {
    const SingleThreadedBlas single;
    body(begin, end);
  };
  if (threads <= 1 || count <= 1) return part(0, count);
  torch::stable::parallel_for(0, count, (count + threads - 1) / threads, part);
}

// Runs run(task, state) for the tasks [0, count), of `work` operations in all. Large and small tasks follow each other:
// every thread takes each n-th, with a state of its own.
template <typename State, typename Run>
void in_turn(int64_t count, double work, const Run& run) {
  const int64_t threads = work < kLeastParallelWork ? 1 : std::min(count, thread_count());
  on_threads(threads, threads, [&](int64_t begin, int64_t end) {
    State state;
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t task = thread; task < count; task += threads) run(task, state);
  });
}

}  // namespace farms_fast
