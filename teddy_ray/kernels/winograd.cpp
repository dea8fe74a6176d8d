// Winograd F(4x4,3x3) float32 convolution, stride 1, padding 1, channels-last, constant weights.
#include <algorithm>
#include <array>
#include <utility>
#include <vector>

namespace {

#ifdef __AVX512F__
constexpr int VL = 16, RMAX = 14;  // 14x2 accumulators + 2 weights + 1 broadcast of 32 registers
#else
constexpr int VL = 8, RMAX = 6;    // 6x2 + 2 + 1 of 16 registers
#endif
constexpr int NR = 2 * VL, KMAX = 4096;
typedef float vf __attribute__((vector_size(4 * VL), aligned(4), may_alias));

// Interpolation points 0, +-PA, +-PB, infinity. Opposite pairs halve the transforms' work.
constexpr double PA = 0.70710678118654752, PB = 1.41421356237309505;  // half the rounding error of 1 and 2
constexpr float a = PA, b = PB, a2 = PA * PA, b2 = PB * PB, a3 = PA * PA * PA, b3 = PB * PB * PB;

inline vf ld(const float* p) { return *(const vf*)p; }
inline void st(float* p, vf v) { *(vf*)p = v; }

template <int S> inline void input1d(const vf* d, vf* t) {  // S: stride between the six values
  vf d0 = d[0], d1 = d[S], d2 = d[2 * S], d3 = d[3 * S], d4 = d[4 * S], d5 = d[5 * S];
  vf ea = d4 - b2 * d2, oa = a * (d3 - b2 * d1);
  vf eb = d4 - a2 * d2, ob = d3 - a2 * d1;
  t[0] = eb - b2 * (d2 - a2 * d0);
  t[S] = ea + oa;
  t[2 * S] = ea - oa;
  t[3 * S] = eb + b * ob;
  t[4 * S] = eb - b * ob;
  t[5 * S] = (d5 - a2 * d3) - b2 * ob;
}

template <int S, int T> inline void output1d(const vf* m, vf* y) {
  vf sa = m[S] + m[2 * S], da = m[S] - m[2 * S], sb = m[3 * S] + m[4 * S], db = m[3 * S] - m[4 * S];
  y[0] = m[0] + sa + sb;
  y[T] = a * da + b * db;
  y[2 * T] = a2 * sa + b2 * sb;
  y[3 * T] = a3 * da + (b3 * db + m[5 * S]);
}

// C[R][NR] = A[R][K] * B[K][NR]; meanwhile asks for a line of pf per k, to stream later weights into L2.
template <int R> void micro(const float* A, long K, const float* B, float* C, long ldc, const float* pf) {
  vf c[R][2] = {};
  for (long k = 0; k < K; k++) {
    vf b0 = ld(B + k * NR), b1 = ld(B + k * NR + VL);
    __builtin_prefetch(pf + 16 * k, 0, 2);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      vf av = A[r * K + k] - vf{};
      c[r][0] += av * b0;
      c[r][1] += av * b1;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) st(C + r * ldc, c[r][0]), st(C + r * ldc + VL, c[r][1]);
}
using Micro = void (*)(const float*, long, const float*, float*, long, const float*);
template <size_t... I> constexpr std::array<Micro, sizeof...(I)> micros(std::index_sequence<I...>) { return {micro<I + 1>...}; }
constexpr auto kernels = micros(std::make_index_sequence<RMAX>());

struct Shape { long H, W, K, N, tw, per; };  // channels K in, N out; tiles per row, per image

void input_tiles(const Shape& s, const float* x, long p0, long n, float* V, long vs) {
  static const std::vector<float> zeros(KMAX);
  for (long p = 0; p < n; p++) {
    long t = p0 + p, img = t / s.per, y0 = t % s.per / s.tw * 4 - 1, x0 = t % s.tw * 4 - 1;
    const float* src[36];
    for (int i = 0; i < 6; i++)
      for (int j = 0; j < 6; j++) {
        long y = y0 + i, xx = x0 + j;
        bool in = y >= 0 && y < s.H && xx >= 0 && xx < s.W;
        src[i * 6 + j] = in ? x + ((img * s.H + y) * s.W + xx) * s.K : zeros.data();
      }
    for (long c = 0; c < s.K; c += VL) {
      vf d[36];
      for (int j = 0; j < 6; j++) {
        for (int i = 0; i < 6; i++) d[i * 6 + j] = ld(src[i * 6 + j] + c);
        input1d<6>(d + j, d + j);
      }
      for (int i = 0; i < 6; i++) {
        input1d<1>(d + i * 6, d + i * 6);
        for (int j = 0; j < 6; j++) st(V + (i * 6 + j) * vs + p * s.K + c, d[i * 6 + j]);
      }
    }
  }
}

void output_tiles(const Shape& s, float* y, long p0, long n, const float* M, long ms) {
  for (long p = 0; p < n; p++) {
    long t = p0 + p, img = t / s.per, oy = t % s.per / s.tw * 4, ox = t % s.tw * 4;
    int h = std::min<long>(4, s.H - oy), w = std::min<long>(4, s.W - ox);
    float* dst = y + ((img * s.H + oy) * s.W + ox) * s.N;
    for (long c = 0; c < s.N; c += VL) {
      vf m[36], r[24], o[16];
      for (int i = 0; i < 4; i++)  // the next tile's lines, so that its stores do not wait for them
        for (int j = 4; j < 8; j++) __builtin_prefetch(dst + (i * s.W + j) * s.N + c, 1, 3);
      for (int j = 0; j < 6; j++) {
        for (int i = 0; i < 6; i++) m[i * 6 + j] = ld(M + (i * 6 + j) * ms + p * s.N + c);
        output1d<6, 6>(m + j, r + j);
      }
      for (int i = 0; i < 4; i++) output1d<1, 1>(r + i * 6, o + i * 4);
      for (int i = 0; i < h; i++)
        for (int j = 0; j < w; j++) st(dst + (i * s.W + j) * s.N + c, o[i * 4 + j]);
    }
  }
}

// M[f] = V[f] U[f]: a panel of weights [K][NR] stays in L1 while all n tiles pass.
void multiply(const Shape& s, long n, const float* V, long vs, const float* U, float* M, long ms) {
  long calls = (n + RMAX - 1) / RMAX, panel = s.K * NR;
  for (int f = 0; f < 36; f++)
    for (long c = 0; c < s.N; c += NR, U += panel)
      for (long i = 0; i < calls; i++) {
        long r0 = n * i / calls, r1 = n * (i + 1) / calls;
        const float* ahead = i < NR / 16 ? U + panel + i * 16 * s.K : U;
        kernels[r1 - r0 - 1](V + f * vs + r0 * s.K, s.K, U, M + f * ms + r0 * s.N + c, s.N, ahead);
      }
}

// One filter of each lane, G w G^T: w[9][NR] -> U[36], `plane` floats apart.
inline void filter(const float* w, float* U, long plane) {
  constexpr float z0 = 1 / (PA * PA * PB * PB), za = 1 / (2 * PA * PA * (PA * PA - PB * PB));
  constexpr float zb = 1 / (2 * PB * PB * (PB * PB - PA * PA));
  auto apply = [](vf w0, vf w1, vf w2, vf* t, int stride) {
    vf ea = za * (w0 + a2 * w2), oa = (za * a) * w1, eb = zb * (w0 + b2 * w2), ob = (zb * b) * w1;
    t[0] = z0 * w0;
    t[stride] = ea + oa;
    t[2 * stride] = ea - oa;
    t[3 * stride] = eb + ob;
    t[4 * stride] = eb - ob;
    t[5 * stride] = w2;
  };
  for (int lane = 0; lane < NR; lane += VL) {
    vf t[18], u[6];
    for (int j = 0; j < 3; j++) apply(ld(w + j * NR + lane), ld(w + (3 + j) * NR + lane), ld(w + (6 + j) * NR + lane), t + j, 3);
    for (int i = 0; i < 6; i++) {
      apply(t[i * 3], t[i * 3 + 1], t[i * 3 + 2], u, 1);
      for (int j = 0; j < 6; j++) st(U + (i * 6 + j) * plane + lane, u[j]);
    }
  }
}

// The same from filters that are not transformed, W [N / NR][K][9][NR]: a panel of all 36 planes at a time, in U.
void multiply_filters(const Shape& s, long n, const float* V, long vs, const float* W, float* U, float* M, long ms) {
  long calls = (n + RMAX - 1) / RMAX, panel = s.K * NR;
  for (long c = 0; c < s.N; c += NR) {
    for (long k = 0; k < s.K; k++, W += 9 * NR) filter(W, U + k * NR, panel);
    for (int f = 0; f < 36; f++)
      for (long i = 0; i < calls; i++) {
        long r0 = n * i / calls, r1 = n * (i + 1) / calls;
        const float* u = U + f * panel;
        const float* ahead = i < NR / 16 ? u + (f < 35 ? panel : 0) + i * 16 * s.K : u;
        kernels[r1 - r0 - 1](V + f * vs + r0 * s.K, s.K, u, M + f * ms + r0 * s.N + c, s.N, ahead);
      }
  }
}

// Blocks of tiles are what threads share out. Small ones keep V and M near; many weights must be read for more tiles
// at once. No sum depends on the split.
struct Blocks {
  long tiles, num, most, vs, ms, us;
  Blocks(const Shape& s, long B, bool transformed, long threads) : tiles(B * s.per) {
    long round = threads * (transformed ? 28 : 56);
    num = (tiles + round - 1) / round * threads;
    most = (tiles + num - 1) / num;
    vs = most * s.K + 16, ms = most * s.N + 16;  // + 16: the 36 planes must not share cache sets
    us = transformed ? 0 : s.K * NR;
  }
  long floats() const { return 36 * (vs + ms + us); }  // that a thread works in
};

Shape shape(long H, long W, long K, long N) { return {H, W, K, N, (W + 3) / 4, (H + 3) / 4 * ((W + 3) / 4)}; }

}  // namespace

extern "C" {

// Channels have to be a multiple of this, and no more than the other.
long panel() { return NR; }
long most_channels() { return KMAX; }

// Floats of scratch that `convolve` needs.
long scratch(long B, long H, long W, long K, long N, long transformed, long threads) {
  return threads * Blocks(shape(H, W, K, N), B, transformed, threads).floats();
}

// input [B, H, W, K]; weights [36][N / NR][K][NR] transformed, or [N / NR][K][9][NR] as they are, of which the many of
// a late layer take a quarter of the memory; output [B, H, W, N].
void convolve(const float* input, const float* weights, float* output, float* scratch, long B, long H, long W, long K,
              long N, long transformed, long threads) {
  Shape s = shape(H, W, K, N);
  Blocks b(s, B, transformed, threads);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long t = 0; t < threads; t++) {
    float *V = scratch + t * b.floats(), *M = V + 36 * b.vs, *U = M + 36 * b.ms;
    for (long i = b.num * t / threads; i < b.num * (t + 1) / threads; i++) {
      long p0 = b.tiles * i / b.num, n = b.tiles * (i + 1) / b.num - p0;
      if (!n) continue;
      input_tiles(s, input, p0, n, V, b.vs);
      if (transformed)
        multiply(s, n, V, b.vs, weights, M, b.ms);
      else
        multiply_filters(s, n, V, b.vs, weights, U, M, b.ms);
      output_tiles(s, output, p0, n, M, b.ms);
    }
  }
}
}
