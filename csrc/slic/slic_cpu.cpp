// SLIC superpixels in integers. Step numbers are those of the specification in docs/kernels/slic.md.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "common/instruction_sets.h"
#include "common/strides_of.h"
#include "slic/cells.h"
#include "slic/lab_tables.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kPositionScale = 16;
constexpr int kWeightShift = 20;
// Columns out of reach on both sides of the reach of a centroid: a vector of pixels less one.
constexpr int kMargin = 15;
constexpr uint32_t kOutOfReach = uint32_t{1} << 31;

// ---- Step 1: colours

// cube_root[t] = lab_root(t)
const std::vector<int32_t>& cube_root_table() {
  static const std::vector<int32_t> table = [] {
    std::vector<int32_t> f(cc4s::kCubeRootSteps + 1);
    // The root before is the guess: the steps up are those of one walk.
    for (int t = 0, root = 0; t <= cc4s::kCubeRootSteps; ++t) f[t] = root = cc4s::lab_root(t, root);
    return f;
  }();
  return table;
}

// ---- Step 2: the grid of cells

struct Grid {
  int64_t height, width;
  int rows, cols;
  int64_t weight;  // of a squared distance in 1/16 pixels, times 2^20
  std::vector<int> row_begin, col_begin;  // [rows + 1], [cols + 1]
  std::vector<int> col_of;                // [W]
  int span;  // widest run of three columns of cells

  int reach_begin(int col) const { return col_begin[std::max(col - 1, 0)]; }
  int reach_end(int col) const { return col_begin[std::min(col + 2, cols)]; }
  int64_t pitch() const { return int64_t{span} + 2 * kMargin; }
};

Grid make_grid(int64_t height, int64_t width, int64_t num_segments, int64_t compactness) {
  Grid grid;
  grid.height = height;
  grid.width = width;
  const cc4s::Cells cells = cc4s::cells_of(height, width, num_segments, compactness);
  grid.rows = static_cast<int>(cells.rows);
  grid.cols = static_cast<int>(cells.cols);
  grid.weight = cells.weight;
  for (int64_t i = 0; i <= cells.rows; ++i) grid.row_begin.push_back(cc4s::cell_begin(i, height, cells.rows));
  for (int64_t j = 0; j <= cells.cols; ++j) grid.col_begin.push_back(cc4s::cell_begin(j, width, cells.cols));
  grid.span = 0;
  for (int j = 0; j < grid.cols; ++j) {
    grid.col_of.insert(grid.col_of.end(), grid.col_begin[j + 1] - grid.col_begin[j], j);
    grid.span = std::max(grid.span, grid.reach_end(j) - grid.reach_begin(j));
  }
  return grid;
}

// ---- Steps 3 to 5: rounds of centroids and nearest centroids

struct Sums {
  int64_t count, l, a, b, x, y;
};

struct Centroid {
  int32_t alive, la, b;  // la: l in the lower 16 bits, a in the upper ones
  int64_t x, y;          // 1/16 pixels
};

// One image: everything the rounds read and write.
struct State {
  const int32_t *la, *b;   // [H, W] each; la as in Centroid
  int32_t* labels;         // [H, W], -1 where masked
  Sums* sums;              // [rows, 3, cols]: what the cells of one row add to the clusters around it
  Centroid* centroids;     // [rows, cols]
  uint32_t* column_terms;  // [rows, cols, margin + span + margin]: weighted squared x distance, 2^31 out of reach
};

void convert_band(const Grid& grid, int band, const uint8_t* image, const Strides& at, const bool* mask,
                  const Strides& mask_at, int32_t* la, int32_t* b, int32_t* labels) {
  const int32_t* cube_root = cube_root_table().data();
  for (int64_t y = grid.row_begin[band]; y < grid.row_begin[band + 1]; ++y) {
    for (int col = 0; col < grid.cols; ++col) {
      for (int64_t x = grid.col_begin[col]; x < grid.col_begin[col + 1]; ++x) {
        const uint8_t* pixel = image + y * at.row + x * at.column;
        const cc4s::Lab lab =
            cc4s::lab_of(cc4s::kLinear[pixel[0]], cc4s::kLinear[pixel[at.channel]],
                         cc4s::kLinear[pixel[2 * at.channel]], [&](int t) { return cube_root[t]; });
        const int64_t i = y * grid.width + x;
        la[i] = lab.l | lab.a << 16;
        b[i] = lab.b;
        const bool valid = mask == nullptr || mask[y * mask_at.row + x * mask_at.column];
        labels[i] = valid ? band * grid.cols + col : -1;
      }
    }
  }
}

// Labels of the cells of row `band` reach only the clusters of rows band - 1 to band + 1.
void accumulate_band(const Grid& grid, const State& state, int band) {
  Sums* sums = state.sums + int64_t{3} * band * grid.cols;
  std::fill(sums, sums + int64_t{3} * grid.cols, Sums{});
  const int base = (band - 1) * grid.cols;
  for (int64_t y = grid.row_begin[band]; y < grid.row_begin[band + 1]; ++y) {
    const int64_t row = y * grid.width;
    for (int64_t x = 0; x < grid.width;) {
      const int32_t label = state.labels[row + x];
      const int64_t begin = x;
      // l in the lower half, a in the upper one: 2^18 pixels fill neither.
      uint64_t la = 0;
      int64_t b = 0;
      const int64_t end = std::min(grid.width, begin + (int64_t{1} << 17));
      for (; x < end && state.labels[row + x] == label; ++x) {
        const uint32_t pixel = static_cast<uint32_t>(state.la[row + x]);
        la += (pixel & 0xffff) | static_cast<uint64_t>(pixel >> 16) << 32;
        b += state.b[row + x];
      }
      if (label < 0) continue;
      Sums& sum = sums[label - base];
      sum.count += x - begin;
      sum.l += static_cast<int64_t>(la & 0xffffffff);
      sum.a += static_cast<int64_t>(la >> 32);
      sum.b += b;
      sum.x += (begin + x - 1) * (x - begin) / 2;
      sum.y += y * (x - begin);
    }
  }
}

int64_t rounded_ratio(int64_t sum, int64_t count) { return (2 * sum + count) / (2 * count); }

void update_centroids(const Grid& grid, const State& state, int row) {
  for (int col = 0; col < grid.cols; ++col) {
    Sums total{};
    for (int band = std::max(row - 1, 0); band <= std::min(row + 1, grid.rows - 1); ++band) {
      const Sums& part = state.sums[(int64_t{3} * band + (row - band + 1)) * grid.cols + col];
      total.count += part.count;
      total.l += part.l;
      total.a += part.a;
      total.b += part.b;
      total.x += part.x;
      total.y += part.y;
    }
    const int64_t id = int64_t{row} * grid.cols + col;
    Centroid& centroid = state.centroids[id];
    centroid = Centroid{};
    if (total.count == 0) continue;
    centroid.alive = 1;
    centroid.la = static_cast<int32_t>(rounded_ratio(total.l, total.count) | rounded_ratio(total.a, total.count) << 16);
    centroid.b = static_cast<int32_t>(rounded_ratio(total.b, total.count));
    centroid.x = rounded_ratio(kPositionScale * total.x, total.count);
    centroid.y = rounded_ratio(kPositionScale * total.y, total.count);
    uint32_t* terms = state.column_terms + id * grid.pitch() + kMargin;
    for (int64_t x = grid.reach_begin(col); x < grid.reach_end(col); ++x) {
      const int64_t d = kPositionScale * x - centroid.x;
      *terms++ = static_cast<uint32_t>((grid.weight * d * d) >> kWeightShift);
    }
  }
}

#define CC4S_VECTOR_CODE "slic/assign.inl"
#include "common/foreach_instruction_set.h"

// Images narrower than a vector: one pixel at a time.
void assign_narrow_band(const Grid& grid, const State& state, int band) {
  const int first = std::max(band - 1, 0), last = std::min(band + 1, grid.rows - 1);
  for (int64_t y = grid.row_begin[band]; y < grid.row_begin[band + 1]; ++y) {
    for (int64_t x = 0; x < grid.width; ++x) {
      const int64_t at = y * grid.width + x;
      if (state.labels[at] < 0) continue;
      int32_t low = std::numeric_limits<int32_t>::max();
      for (int i = first; i <= last; ++i) {
        for (int j = std::max(grid.col_of[x] - 1, 0); j < std::min(grid.col_of[x] + 2, grid.cols); ++j) {
          const int32_t id = i * grid.cols + j;
          const Centroid& centroid = state.centroids[id];
          if (!centroid.alive) continue;
          const int32_t dl = (state.la[at] & 0xffff) - (centroid.la & 0xffff);
          const int32_t da = (state.la[at] >> 16) - (centroid.la >> 16), db = state.b[at] - centroid.b;
          const int64_t dy = kPositionScale * y - centroid.y;
          const uint32_t term = state.column_terms[id * grid.pitch() + kMargin + x - grid.reach_begin(j)];
          const int32_t distance = dl * dl + da * da + db * db + static_cast<int32_t>(term) +
                                   static_cast<int32_t>((grid.weight * dy * dy) >> kWeightShift);
          if (distance >= low) continue;
          low = distance;
          state.labels[at] = id;
        }
      }
    }
  }
}

void assign_band(cc4s::InstructionSet set, const Grid& grid, const State& state, int band, int32_t* row_terms) {
#if CC4S_X86
  if (set == cc4s::InstructionSet::kAvx512 && grid.width >= 16) {
    return avx512::assign_band(grid, state, band, row_terms);
  }
  if (set != cc4s::InstructionSet::kPortable && grid.width >= 8) {
    return avx2::assign_band(grid, state, band, row_terms);
  }
#endif
  if (grid.width >= 4) return portable::assign_band(grid, state, band, row_terms);
  assign_narrow_band(grid, state, band);
}

// ---- Steps 6 to 9: connected segments

struct Run {
  int32_t begin, end, label, region;
};

struct Border {
  int32_t a, b, length;
};

int32_t find_root(std::vector<int32_t>& parent, int32_t i) {
  while (parent[i] != i) {
    parent[i] = parent[parent[i]];
    i = parent[i];
  }
  return i;
}

// The lower id becomes the root: roots keep the raster order of first appearance.
bool unite(std::vector<int32_t>& parent, int32_t a, int32_t b) {
  a = find_root(parent, a);
  b = find_root(parent, b);
  if (a == b) return false;
  parent[std::max(a, b)] = std::min(a, b);
  return true;
}

class Regions {
 public:
  Regions(std::vector<int64_t> sizes, std::vector<Border> borders)
      : size_(std::move(sizes)), borders_(std::move(borders)), parent_(size_.size()) {
    for (size_t i = 0; i < parent_.size(); ++i) parent_[i] = static_cast<int32_t>(i);
    selected_.assign(size_.size(), 0);
    length_.assign(size_.size(), 0);
    offset_.assign(size_.size() + 1, 0);
    alive_ = static_cast<int64_t>(size_.size());
  }

  // Step 7.
  void merge_small(int64_t valid, int64_t clusters) {
    do {
      for (size_t i = 0; i < size_.size(); ++i) {
        selected_[i] = size_[i] > 0 && size_[i] * 4 * clusters < valid;
      }
    } while (merge_selected());
  }

  // Step 8.
  void merge_excess(int64_t limit) {
    while (alive_ > limit) {
      drop_inner_borders();
      std::fill(selected_.begin(), selected_.end(), 0);
      for (const Border& border : borders_) selected_[border.a] = selected_[border.b] = 1;
      std::vector<int32_t> order;
      for (size_t i = 0; i < size_.size(); ++i) {
        if (selected_[i]) order.push_back(static_cast<int32_t>(i));
      }
      const size_t excess = static_cast<size_t>(alive_ - limit);
      if (excess < order.size()) {
        std::sort(order.begin(), order.end(), [&](int32_t i, int32_t j) {
          return size_[i] != size_[j] ? size_[i] < size_[j] : i < j;
        });
        for (size_t k = excess; k < order.size(); ++k) selected_[order[k]] = 0;
      }
      if (!merge_selected()) break;
    }
  }

  // Step 9: the final id of every region, -1 for islands beyond the limit.
  std::vector<int32_t> final_ids(int64_t limit) {
    std::vector<int32_t> kept;
    for (size_t i = 0; i < size_.size(); ++i) {
      if (size_[i] > 0) kept.push_back(static_cast<int32_t>(i));
    }
    if (static_cast<int64_t>(kept.size()) > limit) {
      std::sort(kept.begin(), kept.end(), [&](int32_t i, int32_t j) {
        return size_[i] != size_[j] ? size_[i] > size_[j] : i < j;
      });
      kept.resize(static_cast<size_t>(limit));
      std::sort(kept.begin(), kept.end());
    }
    std::vector<int32_t> ids(size_.size(), -1);
    for (size_t k = 0; k < kept.size(); ++k) ids[kept[k]] = static_cast<int32_t>(k);
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = ids[find_root(parent_, static_cast<int32_t>(i))];
    return ids;
  }

 private:
  void drop_inner_borders() {
    size_t kept = 0;
    for (Border border : borders_) {
      border.a = find_root(parent_, border.a);
      border.b = find_root(parent_, border.b);
      if (border.a != border.b) borders_[kept++] = border;
    }
    borders_.resize(kept);
  }

  // One round: every selected region picks the neighbour with the longest border, then all unite at once.
  bool merge_selected() {
    drop_inner_borders();
    std::fill(offset_.begin(), offset_.end(), 0);
    for (const Border& border : borders_) {
      offset_[border.a + 1] += selected_[border.a];
      offset_[border.b + 1] += selected_[border.b];
    }
    for (size_t i = 1; i < offset_.size(); ++i) offset_[i] += offset_[i - 1];
    std::vector<int64_t> next(offset_.begin(), offset_.end() - 1);
    neighbours_.resize(static_cast<size_t>(offset_.back()));
    for (const Border& border : borders_) {
      if (selected_[border.a]) neighbours_[next[border.a]++] = {border.b, border.length};
      if (selected_[border.b]) neighbours_[next[border.b]++] = {border.a, border.length};
    }
    std::vector<std::pair<int32_t, int32_t>> picks;
    for (size_t i = 0; i < size_.size(); ++i) {
      if (!selected_[i] || offset_[i] == offset_[i + 1]) continue;
      for (int64_t k = offset_[i]; k < offset_[i + 1]; ++k) length_[neighbours_[k].first] += neighbours_[k].second;
      int32_t pick = -1;
      int64_t longest = 0;
      for (int64_t k = offset_[i]; k < offset_[i + 1]; ++k) {
        const int32_t other = neighbours_[k].first;
        if (length_[other] > longest || (length_[other] == longest && other < pick)) {
          longest = length_[other];
          pick = other;
        }
      }
      for (int64_t k = offset_[i]; k < offset_[i + 1]; ++k) length_[neighbours_[k].first] = 0;
      picks.emplace_back(static_cast<int32_t>(i), pick);
    }
    bool merged = false;
    for (const auto& [region, other] : picks) {
      if (unite(parent_, region, other)) {
        --alive_;
        merged = true;
      }
    }
    // Old roots give their size to the new ones.
    for (size_t i = 0; i < size_.size(); ++i) {
      const int32_t root = find_root(parent_, static_cast<int32_t>(i));
      if (size_[i] > 0 && root != static_cast<int32_t>(i)) {
        size_[root] += size_[i];
        size_[i] = 0;
      }
    }
    return merged;
  }

  std::vector<int64_t> size_;  // 0 once united with a lower id
  std::vector<Border> borders_;
  std::vector<int32_t> parent_;
  std::vector<uint8_t> selected_;
  std::vector<int64_t> length_, offset_;
  std::vector<std::pair<int32_t, int32_t>> neighbours_;
  int64_t alive_;
};

// labels [H, W] of clusters in place to ids of segments.
void connect(const Grid& grid, int64_t num_segments, int32_t* labels) {
  std::vector<Run> runs;
  std::vector<int32_t> parent;
  std::vector<Border> borders;  // between runs, then between regions
  std::vector<uint8_t> seen(static_cast<size_t>(grid.rows) * grid.cols, 0);
  int64_t clusters = 0;
  size_t above = 0, above_end = 0;
  for (int64_t y = 0; y < grid.height; ++y) {
    const int32_t* row = labels + y * grid.width;
    const size_t begin = runs.size();
    for (int32_t x = 0; x < grid.width;) {
      const int32_t start = x, label = row[x];
      while (x < grid.width && row[x] == label) ++x;
      if (label < 0) continue;
      const int32_t id = static_cast<int32_t>(runs.size());
      if (!seen[label]) ++clusters;
      seen[label] = 1;
      if (runs.size() > begin && runs.back().end == start) borders.push_back({id - 1, id, 1});
      runs.push_back({start, x, label, 0});
      parent.push_back(id);
    }
    for (size_t i = above, j = begin; i < above_end && j < runs.size();) {
      const int32_t overlap = std::min(runs[i].end, runs[j].end) - std::max(runs[i].begin, runs[j].begin);
      if (overlap > 0) {
        const int32_t up = static_cast<int32_t>(i), down = static_cast<int32_t>(j);
        if (runs[i].label == runs[j].label) {
          unite(parent, up, down);
        } else {
          borders.push_back({up, down, overlap});
        }
      }
      // Ends are compared before either index moves.
      if (runs[i].end < runs[j].end) {
        ++i;
      } else {
        ++j;
      }
    }
    above = begin;
    above_end = runs.size();
  }

  std::vector<int64_t> sizes;
  int64_t valid = 0;
  for (size_t i = 0; i < runs.size(); ++i) {
    const int32_t root = find_root(parent, static_cast<int32_t>(i));
    if (root == static_cast<int32_t>(i)) {
      runs[i].region = static_cast<int32_t>(sizes.size());
      sizes.push_back(0);
    } else {
      runs[i].region = runs[root].region;
    }
    sizes[runs[i].region] += runs[i].end - runs[i].begin;
    valid += runs[i].end - runs[i].begin;
  }
  for (Border& border : borders) border = {runs[border.a].region, runs[border.b].region, border.length};

  Regions regions(std::move(sizes), std::move(borders));
  regions.merge_small(valid, clusters);
  regions.merge_excess(num_segments);
  const std::vector<int32_t> ids = regions.final_ids(num_segments);

  size_t next = 0;
  for (int64_t y = 0; y < grid.height; ++y) {
    int32_t* row = labels + y * grid.width;
    for (int32_t x = 0; x < grid.width;) {
      if (row[x] < 0) {
        ++x;
        continue;
      }
      const Run& run = runs[next++];
      std::fill(row + run.begin, row + run.end, ids[run.region]);
      x = run.end;
    }
  }
}

// image [B, 3, H, W] uint8, mask [B, H, W] bool -> ids [B, H, W] int32. compactness: in 1/256.
Tensor slic(const Tensor& image, const std::optional<Tensor>& mask, int64_t num_segments, int64_t compactness,
            int64_t iterations) {
  STD_TORCH_CHECK(image.dim() == 4 && image.size(1) == 3 && image.scalar_type() == ScalarType::Byte,
                  "image: expected uint8 (B, 3, H, W)");
  const int64_t batch = image.size(0), height = image.size(2), width = image.size(3), pixels = height * width;
  STD_TORCH_CHECK(num_segments >= 1, "num_segments: expected at least 1");
  STD_TORCH_CHECK(compactness >= 0 && compactness <= 100 * 256, "compactness: expected 0 to 100 in 1/256");
  STD_TORCH_CHECK(std::max(height, width) <= (int64_t{1} << 20) && pixels < (int64_t{1} << 31),
                  "image: expected sides up to 2^20 and fewer than 2^31 pixels");
  if (mask.has_value()) {
    STD_TORCH_CHECK(mask->dim() == 3 && mask->scalar_type() == ScalarType::Bool && mask->size(0) == batch &&
                        mask->size(1) == height && mask->size(2) == width,
                    "mask: expected bool (B, H, W) of the image");
  }
  Tensor labels = torch::stable::empty({batch, height, width}, ScalarType::Int);
  if (batch == 0 || pixels == 0) return labels;

  const Grid grid = make_grid(height, width, num_segments, compactness);
  const int64_t cells = int64_t{grid.rows} * grid.cols;
  const uint8_t* pixels_in = image.const_data_ptr<uint8_t>();
  const bool* mask_in = mask.has_value() ? mask->const_data_ptr<bool>() : nullptr;
  const Strides at = strides_of(image);
  const Strides mask_at = mask.has_value() ? strides_of(*mask) : Strides{};
  int32_t* out = labels.mutable_data_ptr<int32_t>();

  std::vector<int32_t> lab(static_cast<size_t>(batch * 2 * pixels));
  std::vector<Sums> sums(static_cast<size_t>(batch * 3 * cells));
  std::vector<Centroid> centroids(static_cast<size_t>(batch * cells));
  std::vector<uint32_t> column_terms(static_cast<size_t>(batch * cells * grid.pitch()), kOutOfReach);
  const auto state_of = [&](int64_t b) {
    int32_t* planes = lab.data() + b * 2 * pixels;
    return State{planes,
                 planes + pixels,
                 out + b * pixels,
                 sums.data() + b * 3 * cells,
                 centroids.data() + b * cells,
                 column_terms.data() + b * cells * grid.pitch()};
  };
  // Work is cut into rows of cells whatever the number of threads, and integer sums do not depend on the order.
  const auto for_each_band = [&](const auto& body) {
    torch::stable::parallel_for(0, batch * grid.rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i / grid.rows, static_cast<int>(i % grid.rows));
    });
  };

  const cc4s::InstructionSet set = cc4s::instruction_set();
  cube_root_table();
  for_each_band([&](int64_t b, int band) {
    int32_t* planes = lab.data() + b * 2 * pixels;
    convert_band(grid, band, pixels_in + b * at.batch, at, mask_in ? mask_in + b * mask_at.batch : nullptr, mask_at,
                 planes, planes + pixels, out + b * pixels);
    accumulate_band(grid, state_of(b), band);
  });
  for (int64_t round = 0; round < iterations; ++round) {
    for_each_band([&](int64_t b, int row) { update_centroids(grid, state_of(b), row); });
    for_each_band([&](int64_t b, int band) {
      std::vector<int32_t> row_terms(static_cast<size_t>(3 * grid.cols));
      assign_band(set, grid, state_of(b), band, row_terms.data());
      accumulate_band(grid, state_of(b), band);
    });
  }
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) connect(grid, num_segments, out + b * pixels);
  });
  return labels;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cc4s_kernels, CPU, m) { m.impl("slic", TORCH_BOX(&slic)); }
