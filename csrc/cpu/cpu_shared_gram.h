// Gram matrices of many windows on the CPU, the products that overlapping ones have in common formed once where that is
// less work (see host/gram_sharing.h).
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "csrc/cpu/cpu_gram.h"

namespace farms_fast {

// What a thread forms panels in.
template <typename T>
struct FormScratch {
  Scratch<T> forward, pieces;
};

// One group of a run's inner starts: the band of sums for each of them.
template <typename T>
class GroupSums {
 public:
  GroupSums(const Window* windows, const WindowRun& run, const InnerGroup& group, DType in)
      : grid_(run.grid), group_(group), first_(run.begin), in_(in) {
    const SharedGrid& grid = *grid_;
    const Window& window = windows[run.begin];
    span_ = grid.inner_starts[group.end - 1] - grid.inner_starts[group.begin] + grid.inner;
    const int64_t vector_stride = grid.vectors_are_rows ? window.row_stride : window.column_stride;
    const int64_t element_stride = grid.vectors_are_rows ? window.column_stride : window.row_stride;
    const int64_t offset = run_offset(windows, run) + grid.inner_starts[group.begin] * element_stride;
    vectors_ = {static_cast<const char*>(window.matrix) + offset * static_cast<int64_t>(item_size(in)), vector_stride,
                element_stride, span_};
    int64_t offset_in_band = 0;
    for (const BandPanel& panel : grid.panels) {
      // Panels begin at multiples of the cache line: the same bits come out again.
      panel_offsets_.push_back(offset_in_band);
      offset_in_band += (panel.width * (panel.end - panel.begin) + 15) / 16 * 16;
    }
    band_ = offset_in_band;
  }

  int64_t panels() const { return static_cast<int64_t>(grid_->panels.size()); }
  int64_t vectors() const { return grid_->extent(); }
  int64_t bytes() const {
    const int64_t packed = usable_in_place<T>(vectors_, in_) ? 0 : grid_->extent() * span_;
    return (band_ * size() + packed) * static_cast<int64_t>(sizeof(T));
  }

  void allocate() {
    if (!usable_in_place<T>(vectors_, in_)) packed_.reserve(grid_->extent() * span_);
    sums_.reserve(band_ * size());
  }

  // Vectors [begin, end) into the packed copy, where one is needed.
  void pack(int64_t begin, int64_t end) {
    if (usable_in_place<T>(vectors_, in_)) return;
    pack_window(part_of(vectors_, begin, in_), end - begin, in_, packed_.data() + begin * span_);
  }

  // The sums of one panel: backward from the last start, then forward, as gram_sharing.h has it.
  void form(int64_t panel, FormScratch<T>& scratch) {
    const SharedGrid& grid = *grid_;
    const std::vector<int64_t>& starts = grid.inner_starts;
    const int64_t last = group_.end - 1, elements = area(panel);
    for (int64_t j = last - 1; j >= group_.begin; --j) {
      if (j + 1 < last) std::copy_n(sum(j + 1, panel), elements, sum(j, panel));
      multiply(panel, starts[j], starts[j + 1], j + 1 < last, sum(j, panel), scratch.pieces);
    }
    T* total = size() > 1 ? scratch.forward.reserve(elements) : sum(last, panel);
    for (int64_t j = group_.begin; j <= last; ++j) {
      const bool first = j == group_.begin;
      multiply(panel, first ? starts[last] : starts[j - 1] + grid.inner, starts[j] + grid.inner, !first, total,
               scratch.pieces);
      T* to = sum(j, panel);
      if (j < last)
        for (int64_t i = 0; i < elements; ++i) to[i] += total[i];
      else if (to != total)
        std::copy_n(total, elements, to);
    }
  }

  // Calls visit(window, vector start, inner start) for the windows of the group, `window` their row in the table.
  template <typename Visit>
  void for_each_window(const Visit& visit) const {
    for (size_t i = 0; i < grid_->vector_starts.size(); ++i)
      for (int64_t j = group_.begin; j < group_.end; ++j) {
        const int64_t window = grid_->windows[i * grid_->inner_starts.size() + static_cast<size_t>(j)];
        if (window >= 0) visit(first_ + window, static_cast<int64_t>(i), j);
      }
  }

  // The triangle that gram_triangle fills.
  void copy(int64_t vector_start, int64_t inner_start, T* gram) const {
    const SharedGrid& grid = *grid_;
    const int64_t start = grid.vector_starts[static_cast<size_t>(vector_start)], end = start + grid.order;
    for (size_t p = 0; p < grid.panels.size(); ++p) {
      const BandPanel& panel = grid.panels[p];
      const T* from = sum(inner_start, static_cast<int64_t>(p));
      const int64_t height = panel.end - panel.begin;
      for (int64_t v = std::max(start, panel.begin); v < std::min(end, panel.begin + panel.width); ++v)
        std::copy_n(from + (v - panel.begin) * (height + 1), end - v, gram + (v - start) * (grid.order + 1));
    }
  }

 private:
  int64_t size() const { return group_.end - group_.begin; }
  int64_t area(int64_t panel) const {
    const BandPanel& p = grid_->panels[static_cast<size_t>(panel)];
    return p.width * (p.end - p.begin);
  }
  // (height, width), column-major: the panel's own vectors are the columns.
  T* sum(int64_t j, int64_t panel) const {
    return sums_.data() + (j - group_.begin) * band_ + panel_offsets_[static_cast<size_t>(panel)];
  }

  void multiply(int64_t panel, int64_t begin, int64_t end, bool add, T* sum, Scratch<T>& pieces) const {
    const BandPanel& p = grid_->panels[static_cast<size_t>(panel)];
    const bool in_place = usable_in_place<T>(vectors_, in_);
    const int64_t stride = in_place ? std::max<int64_t>(vectors_.vector_stride, 1) : span_;
    const T* from = (in_place ? static_cast<const T*>(vectors_.data) : packed_.data()) + p.begin * stride + begin -
                    grid_->inner_starts[static_cast<size_t>(group_.begin)];
    const int64_t height = p.end - p.begin;
    multiply_vectors(height, p.width, end - begin, summed_depth(grid_->order), from, from, stride, add, sum, height,
                     pieces);
  }

  std::shared_ptr<const SharedGrid> grid_;
  InnerGroup group_;
  int64_t first_;
  DType in_;
  int64_t span_ = 0;                    // elements of the vectors that the group's windows hold
  WindowView vectors_;                  // all vectors of the grid, those elements of them
  std::vector<int64_t> panel_offsets_;  // of each panel in a band of sums
  int64_t band_ = 0;                    // elements of such a band
  Scratch<T> packed_, sums_;
};

// Windows that are solved together, and what they share.
template <typename T>
class GramBatch {
 public:
  GramBatch(const Window* windows, int64_t order, DType in) : windows_(windows), order_(order), in_(in) {}

  int64_t count() const { return static_cast<int64_t>(sources_.size()); }
  int64_t bytes() const { return bytes_; }
  // Operations for the Gram matrices; those that are shared count as if they were not.
  double work() const {
    double sum = 0;
    for (const Source& source : sources_) {
      const Window& window = windows_[source.window];
      sum += static_cast<double>(order_) * static_cast<double>(window.rows) * static_cast<double>(window.columns);
    }
    return sum;
  }
  int64_t window(int64_t i) const { return sources_[static_cast<size_t>(i)].window; }

  void add(int64_t window) { sources_.push_back({window, nullptr, 0, 0}); }

  void add(std::unique_ptr<GroupSums<T>> sums) {
    const GroupSums<T>* from = sums.get();
    from->for_each_window([&](int64_t window, int64_t i, int64_t j) { sources_.push_back({window, from, i, j}); });
    bytes_ += from->bytes();
    groups_.push_back(std::move(sums));
  }

  void form_sums() {
    struct Task {
      GroupSums<T>* sums;
      int64_t begin;
    };
    constexpr int64_t together = 64;
    std::vector<Task> packs, panels;
    for (const auto& sums : groups_) {
      sums->allocate();
      for (int64_t v = 0; v < sums->vectors(); v += together) packs.push_back({sums.get(), v});
      for (int64_t p = 0; p < sums->panels(); ++p) panels.push_back({sums.get(), p});
    }
    const double all = groups_.empty() ? 0 : work();
    in_turn<NoState>(static_cast<int64_t>(packs.size()), all, [&](int64_t t, NoState&) {
      const Task& task = packs[static_cast<size_t>(t)];
      task.sums->pack(task.begin, std::min(task.begin + together, task.sums->vectors()));
    });
    in_turn<FormScratch<T>>(static_cast<int64_t>(panels.size()), all, [&](int64_t t, FormScratch<T>& scratch) {
      const Task& task = panels[static_cast<size_t>(t)];
      task.sums->form(task.begin, scratch);
    });
  }

  // gram_triangle of one of the windows.
  void triangle(int64_t i, Scratch<T>& packed, T* gram) const {
    const Source& source = sources_[static_cast<size_t>(i)];
    if (source.sums != nullptr)
      source.sums->copy(source.vector_start, source.inner_start, gram);
    else
      gram_triangle(view_of(windows_[source.window], in_), order_, in_, packed, gram);
  }

 private:
  struct Source {
    int64_t window;
    const GroupSums<T>* sums;  // none: the window's own products
    int64_t vector_start, inner_start;
  };

  const Window* windows_;
  int64_t order_;
  DType in_;
  std::vector<Source> sources_;
  std::vector<std::unique_ptr<GroupSums<T>>> groups_;
  int64_t bytes_ = 0;
};

// Calls run(batch) until every window has been in a batch, each with what it shares formed. either_side: see
// plan_gram_sharing. memory: bytes for shared sums.
template <typename T, typename Run>
void over_gram_batches(const Window* windows, int64_t count, int64_t order, DType in, bool either_side, int64_t memory,
                       const Run& run) {
  // So many windows keep the threads busy although they wait for each other at the end of a batch.
  const int64_t enough = 8 * thread_count();
  const std::vector<WindowRun> runs =
      plan_gram_sharing(windows, count, either_side, static_cast<int64_t>(sizeof(T)), memory, kCpuSharing);
  auto batch = std::make_unique<GramBatch<T>>(windows, order, in);
  for (const WindowRun& part : runs)
    if (part.grid == nullptr)
      for (int64_t b = part.begin; b < part.begin + part.count; ++b) batch->add(b);
  const auto finish = [&] {
    if (batch->count() == 0) return;
    batch->form_sums();
    run(*batch);
    batch = std::make_unique<GramBatch<T>>(windows, order, in);
  };
  for (const WindowRun& part : runs) {
    if (part.grid == nullptr) continue;
    for (const InnerGroup& group : part.grid->groups) {
      auto sums = std::make_unique<GroupSums<T>>(windows, part, group, in);
      if (batch->count() >= enough || batch->bytes() + sums->bytes() > memory) finish();
      batch->add(std::move(sums));
    }
  }
  finish();
}

}  // namespace farms_fast
