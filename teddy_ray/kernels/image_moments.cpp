// Means and variances of each image's channels, in double, of float32 activations, channels-last, in one pass.

namespace {
constexpr long LANES = 32;  // channels that are summed in registers

// One image, `width` channels from the first at x. The sums are taken around the image's own first position: of a
// sample with that value in it, (mean - value)^2 is at most `positions` times the variance, so that no more digits are
// lost in the difference than `positions` has, whatever mean / sigma is.
template <long WIDTH>
inline void sum(const float* x, double* mean, double* var, long positions, long C, long width) {
  double s[WIDTH] = {}, q[WIDTH] = {}, first[WIDTH];
  for (long c = 0; c < width; c++) first[c] = x[c];
  for (long p = 0; p < positions; p++) {
    const float* row = x + p * C;
#pragma omp simd
    for (long c = 0; c < width; c++) {
      double d = row[c] - first[c];
      s[c] += d;
      q[c] += d * d;
    }
  }
  for (long c = 0; c < width; c++) {
    double offset = s[c] / positions, rest = q[c] / positions - offset * offset;
    mean[c] = first[c] + offset;
    var[c] = rest < 0.0 ? 0.0 : rest;  // NaN stays
  }
}
}  // namespace

extern "C" {

// x [n, positions, C]; mean [n, C], var [n, C], biased.
void image_moments(const float* x, double* mean, double* var, long n, long positions, long C, long threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long i = 0; i < n; i++) {
    long c = 0;
    for (; c + LANES <= C; c += LANES)
      sum<LANES>(x + i * positions * C + c, mean + i * C + c, var + i * C + c, positions, C, LANES);
    if (c < C) sum<LANES>(x + i * positions * C + c, mean + i * C + c, var + i * C + c, positions, C, C - c);
  }
}
}
