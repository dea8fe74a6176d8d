// Means and variances of the channels of float32 activations, channels-last, in one pass.
#include <algorithm>
#include <vector>

namespace {
// Sums of so many rows are float32; they are added up in double. Fixed, so that no sum depends on the threads.
constexpr long ROWS = 512;
}  // namespace

extern "C" {

// Floats of scratch that `channel_moments` needs.
long moments_scratch(long rows, long C) { return (rows + ROWS - 1) / ROWS * 2 * C; }

// x [rows, C], near [C] around which is summed; mean [C], var [C], biased.
void channel_moments(const float* x, const float* near, float* mean, float* var, float* scratch, long rows, long C,
                     long threads) {
  long blocks = (rows + ROWS - 1) / ROWS;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long b = 0; b < blocks; b++) {
    float *__restrict s = scratch + b * 2 * C, *__restrict q = s + C;
    std::fill(s, s + 2 * C, 0.0f);
    for (long r = b * ROWS; r < std::min(rows, (b + 1) * ROWS); r++) {
      const float* row = x + r * C;
#pragma omp simd
      for (long c = 0; c < C; c++) {
        float d = row[c] - near[c];
        s[c] += d;
        q[c] += d * d;
      }
    }
  }
  std::vector<double> S(C), Q(C);
  for (long b = 0; b < blocks; b++)
    for (long c = 0; c < C; c++) S[c] += scratch[b * 2 * C + c], Q[c] += scratch[b * 2 * C + C + c];
  for (long c = 0; c < C; c++) {
    double offset = S[c] / rows;
    mean[c] = near[c] + offset;
    var[c] = std::max(0.0, Q[c] / rows - offset * offset);
  }
}
}
