// What oneDNN has no kernel for: activations to codes in one pass, attention on codes, and Winograd convolution of narrow codes.
// Plain C interface, called by native.py. Activations are channels-last: (B, H, W, C) in memory.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>
#include <omp.h>
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define VNNI 1
#include <immintrin.h>
#endif

namespace {

struct Free { void operator()(void* p) const { std::free(p); } };
template <class T> using Buffer = std::unique_ptr<T[], Free>;
template <class T> Buffer<T> buffer(size_t count) {
  return Buffer<T>(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 127) / 64 * 64)));
}

// exp(x) to about one unit in the last place; loops over it become vector code.
inline float exponential(float x) {
  x = std::min(std::max(x, -87.0f), 88.0f);
  const float n = __builtin_rintf(x * 1.44269504088896341f);
  const float r = (x - n * 0.693145751953125f) - n * 1.428606765330187e-6f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

inline uint8_t code(float x, float s, float z, float qmax) {
  return static_cast<uint8_t>(static_cast<int32_t>(std::min(std::max(__builtin_rintf(x / s) + z, 0.0f), qmax)));
}

}  // namespace

extern "C" {

struct Target {
  uint8_t* out;
  const float *scale, *zero_point;  // one, or one for each sample
  const float* channels;            // (C): factors after the SiLU, or null
  int64_t per_sample, qmax, norm, silu, repeat, left, right, above, below;  // each pixel `repeat` times both ways
};

struct Activation {
  const float* part[2];
  int64_t channels[2];   // the second is 0 where there is one part
  const float* shift;    // (B, C), or null
  int64_t batch, height, width;
  const float *gamma, *beta;
  int64_t groups;        // 0: no group norm
  double eps;
};

int has_vnni() {
#ifdef VNNI
  return 1;
#else
  return 0;
#endif
}

}  // extern "C"

namespace {

constexpr int64_t kRun = 16;    // pixels: few enough that float sums stay exact to their rounding
constexpr int64_t kLanes = 16;  // channels at once
typedef float Lanes __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

// A value of each channel of a sample that is near its mean, so that squares of what is left lose no digits: (C).
void centers_of(const Activation& x, int64_t n, float* center) {
  const int64_t pixels = x.height * x.width, taken = std::min(kRun, pixels);
  for (int64_t part = 0, offset = 0; part < 2; offset += x.channels[part++]) {
    const int64_t count = x.channels[part];
    const float* values = x.part[part] + n * pixels * count;
    std::fill(center + offset, center + offset + count, 0.0f);
    for (int64_t pixel = 0; pixel < taken; ++pixel)
      for (int64_t c = 0; c < count; ++c) center[offset + c] += values[pixel * count + c] / taken;
  }
}

// Sums over pixels [begin, end) of x - center and of its square, added to sums and squares (C).
void add_sums(const Activation& x, int64_t n, int64_t begin, int64_t end, const float* center, double* sums, double* squares) {
  const int64_t pixels = x.height * x.width;
  for (int64_t first = begin; first < end; first += kRun) {
    const int64_t last = std::min(end, first + kRun);
    for (int64_t part = 0, offset = 0; part < 2; offset += x.channels[part++]) {
      const int64_t count = x.channels[part], whole = count / kLanes * kLanes;
      const float* values = x.part[part] + n * pixels * count;
      for (int64_t c = 0; c < whole; c += kLanes) {
        const Lanes middle = *reinterpret_cast<const Lanes*>(center + offset + c);
        Lanes sum = {}, square = {};
        for (int64_t pixel = first; pixel < last; ++pixel) {
          const float* own = values + pixel * count + c;
          __builtin_prefetch(own + kRun * count);  // the next run's: the order is not the memory's
          const Lanes d = *reinterpret_cast<const Lanes*>(own) - middle;
          sum += d;
          square += d * d;
        }
        for (int64_t i = 0; i < kLanes; ++i) {
          sums[offset + c + i] += sum[i];
          squares[offset + c + i] += square[i];
        }
      }
      for (int64_t c = whole; c < count; ++c) {
        float sum = 0, square = 0;
        for (int64_t pixel = first; pixel < last; ++pixel) {
          const float d = values[pixel * count + c] - center[offset + c];
          sum += d;
          square += d * d;
        }
        sums[offset + c] += sum;
        squares[offset + c] += square;
      }
    }
  }
}

// Group norm of x + shift as y = x a_c + b_c: its a and b of one sample, of the sums of x - center and of its square.
void affine(const Activation& x, const float* center, const double* sums, const double* squares, const float* shift, float* a,
            float* b) {
  const int64_t total = x.channels[0] + x.channels[1], width = total / x.groups, pixels = x.height * x.width;
  for (int64_t g = 0; g < x.groups; ++g) {
    double sum = 0, square = 0;
    const auto middle = [&](int64_t c) { return center[c] + (shift ? static_cast<double>(shift[c]) : 0.0); };
    for (int64_t c = g * width; c < (g + 1) * width; ++c) sum += sums[c] + middle(c) * pixels;
    const double mean = sum / (width * pixels);
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      const double away = middle(c) - mean;
      square += squares[c] + away * (2 * sums[c] + away * pixels);
    }
    const double rstd = 1 / std::sqrt(square / (width * pixels) + x.eps);
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      const double factor = rstd * (x.gamma ? x.gamma[c] : 1.0f);
      a[c] = static_cast<float>(factor);
      b[c] = static_cast<float>(((shift ? shift[c] : 0.0) - mean) * factor + (x.beta ? x.beta[c] : 0.0f));
    }
  }
}

// True if all values have codes: none is NaN.
template <bool kAffine, bool kSilu, bool kChannels = false>
bool write_codes(const float* x, const float* a, const float* b, int64_t count, float s, float z, float qmax, uint8_t* out,
                 const float* factors = nullptr) {
  int32_t strange = 0;
#pragma omp simd reduction(| : strange)
  for (int64_t c = 0; c < count; ++c) {
    float y = kAffine ? x[c] * a[c] + b[c] : x[c];
    if (kSilu) y = y / (1.0f + exponential(-y));
    if (kChannels) y *= factors[c];
    out[c] = code(y, s, z, qmax);
    strange |= y != y;
  }
  return !strange;
}

// The same, with factors where they are not null.
template <bool kAffine, bool kSilu>
bool write_with(const float* x, const float* a, const float* b, int64_t count, float s, float z, float qmax, uint8_t* out,
                const float* factors) {
  return factors ? write_codes<kAffine, kSilu, true>(x, a, b, count, s, z, qmax, out, factors)
                 : write_codes<kAffine, kSilu, false>(x, a, b, count, s, z, qmax, out);
}

// Rows [begin, end) of a sample's padded codes. True as `write_codes`.
bool write_rows(const Activation& x, const Target& t, int64_t n, int64_t begin, int64_t end, const float* a, const float* b,
                bool shifted) {
  const int64_t total = x.channels[0] + x.channels[1], inner = x.width * t.repeat, columns = inner + t.left + t.right;
  const int64_t rows = x.height * t.repeat + t.above + t.below;
  const float s = t.scale[t.per_sample ? n : 0], z = t.zero_point[t.per_sample ? n : 0], qmax = static_cast<float>(t.qmax);
  const bool affine = t.norm || shifted;
  bool good = true;
  for (int64_t row = begin; row < end; ++row) {
    uint8_t* out = t.out + (n * rows + row) * columns * total;
    const int64_t h = (row - t.above) / t.repeat;
    if (row < t.above || h >= x.height) {
      std::memset(out, static_cast<int>(z), columns * total);
      continue;
    }
    if (t.left) std::memset(out, static_cast<int>(z), t.left * total);
    if (t.right) std::memset(out + (t.left + inner) * total, static_cast<int>(z), t.right * total);
    for (int64_t w = 0; w < x.width; ++w) {
      uint8_t* pixel = out + (t.left + w * t.repeat) * total;
      for (int64_t part = 0, offset = 0; part < 2; offset += x.channels[part++]) {
        const int64_t count = x.channels[part];
        if (!count) continue;
        const float* values = x.part[part] + ((n * x.height + h) * x.width + w) * count;
        uint8_t* own = pixel + offset;
        const float *ac = a + offset, *bc = b + offset;
        const float* factors = t.channels ? t.channels + offset : nullptr;
        if (affine && t.silu) good &= write_with<true, true>(values, ac, bc, count, s, z, qmax, own, factors);
        else if (affine) good &= write_with<true, false>(values, ac, bc, count, s, z, qmax, own, factors);
        else if (t.silu) good &= write_with<false, true>(values, ac, bc, count, s, z, qmax, own, factors);
        else good &= write_with<false, false>(values, ac, bc, count, s, z, qmax, own, factors);
      }
      for (int64_t again = 1; again < t.repeat; ++again) std::memcpy(pixel + again * total, pixel, total);
    }
  }
  return good;
}

}  // namespace

// 1, or 0 if a value has no code.
extern "C" int encode(const Activation* activation, const Target* targets, int64_t count) {
  const Activation& x = *activation;
  const int64_t total = x.channels[0] + x.channels[1], pixels = x.height * x.width;
  // Samples side by side, each from the cache a second time; a sample alone is cut into rows.
  const int64_t threads = omp_get_max_threads(), cuts = x.batch >= threads ? 1 : std::min<int64_t>(threads, x.height);
  std::vector<double> sums(x.batch * cuts * total), squares(x.batch * cuts * total);
  std::vector<float> scales(x.batch * total, 1.0f), biases(x.batch * total, 0.0f), centers(x.batch * cuts * total);
  int good = 1;
  const auto shift = [&](int64_t n) { return x.shift ? x.shift + n * total : nullptr; };
  const auto measure = [&](int64_t n, int64_t cut) {
    const int64_t at = (n * cuts + cut) * total;
    centers_of(x, n, &centers[at]);
    add_sums(x, n, cut * pixels / cuts, (cut + 1) * pixels / cuts, &centers[at], &sums[at], &squares[at]);
  };
  const auto gather = [&](int64_t n) {
    const int64_t at = n * cuts * total;
    for (int64_t i = total; i < cuts * total; ++i) {
      sums[at + i % total] += sums[at + i];
      squares[at + i % total] += squares[at + i];
    }
    affine(x, &centers[at], &sums[at], &squares[at], shift(n), &scales[n * total], &biases[n * total]);
  };
  const auto write = [&](int64_t n, int64_t cut) {
    for (int64_t i = 0; i < count; ++i) {
      const Target& t = targets[i];
      std::vector<float> ones;
      const float *a = &scales[n * total], *b = &biases[n * total];
      const bool shifted = x.shift && !t.norm;
      if (shifted) { ones.assign(total, 1.0f); a = ones.data(); b = shift(n); }
      const int64_t rows = x.height * t.repeat + t.above + t.below;
      if (!write_rows(x, t, n, cut * rows / cuts, (cut + 1) * rows / cuts, a, b, shifted)) {
#pragma omp atomic write
        good = 0;
      }
    }
  };
#pragma omp parallel
  if (cuts == 1) {
#pragma omp for schedule(dynamic)
    for (int64_t n = 0; n < x.batch; ++n) {
      if (x.groups) { measure(n, 0); gather(n); }
      write(n, 0);
    }
  } else {
    if (x.groups) {
#pragma omp for schedule(static)
      for (int64_t task = 0; task < x.batch * cuts; ++task) measure(task / cuts, task % cuts);
#pragma omp single
      for (int64_t n = 0; n < x.batch; ++n) gather(n);
    }
#pragma omp for schedule(static)
    for (int64_t task = 0; task < x.batch * cuts; ++task) write(task / cuts, task % cuts);
  }
  return good;
}

#ifdef VNNI
namespace {

// C (M, 16 NV) int32 = init + A (M, 4 K) uint8 times B, packed (K, columns, 4) int8.
template <int M, int NV>
void multiply(const uint8_t* a, int64_t lda, const int8_t* b, int64_t ldb, int32_t* c, int64_t ldc, int64_t k,
              const int32_t* init) {
  __m512i sums[M][NV];
#pragma GCC unroll 8
  for (int j = 0; j < NV; ++j) {
    const __m512i first = init ? _mm512_loadu_si512(init + 16 * j) : _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) sums[i][j] = first;
  }
  for (int64_t step = 0; step < k; ++step) {
    __m512i right[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) right[j] = _mm512_loadu_si512(b + step * ldb + 64 * j);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      int32_t four;
      std::memcpy(&four, a + i * lda + 4 * step, 4);
      const __m512i left = _mm512_set1_epi32(four);
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) sums[i][j] = _mm512_dpbusd_epi32(sums[i][j], left, right[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) _mm512_storeu_si512(c + i * ldc + 16 * j, sums[i][j]);
}

template <int NV>
void multiply_rows(const uint8_t* a, int64_t lda, const int8_t* b, int64_t ldb, int32_t* c, int64_t ldc, int64_t m, int64_t k,
                   const int32_t* init) {
  int64_t i = 0;
  for (; i + 6 <= m; i += 6) multiply<6, NV>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, k, init);
  for (; i + 2 <= m; i += 2) multiply<2, NV>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, k, init);
  if (i < m) multiply<1, NV>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, k, init);
}

// `vectors` of 16 columns, 1..4.
void multiply_block(const uint8_t* a, int64_t lda, const int8_t* b, int64_t ldb, int32_t* c, int64_t ldc, int64_t m, int64_t k,
                    int64_t vectors, const int32_t* init) {
  switch (vectors) {
    case 1: return multiply_rows<1>(a, lda, b, ldb, c, ldc, m, k, init);
    case 2: return multiply_rows<2>(a, lda, b, ldb, c, ldc, m, k, init);
    case 3: return multiply_rows<3>(a, lda, b, ldb, c, ldc, m, k, init);
    default: return multiply_rows<4>(a, lda, b, ldb, c, ldc, m, k, init);
  }
}

int64_t up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// B^T d B of F(2x2, 3x3) for 64 channels of bytes, modulo 256; `offset` makes each of the 16 values unsigned.
void input_transform(const uint8_t* codes, int64_t row, int64_t column, uint8_t* out, int64_t stride, __mmask64 mask, __m512i offset) {
  __m512i d[4][4], e[4][4];
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) d[i][j] = _mm512_maskz_loadu_epi8(mask, codes + i * row + j * column);
  for (int j = 0; j < 4; ++j) {
    e[0][j] = _mm512_sub_epi8(d[0][j], d[2][j]);
    e[1][j] = _mm512_add_epi8(d[1][j], d[2][j]);
    e[2][j] = _mm512_sub_epi8(d[2][j], d[1][j]);
    e[3][j] = _mm512_sub_epi8(d[1][j], d[3][j]);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512i f[4] = {_mm512_sub_epi8(e[i][0], e[i][2]), _mm512_add_epi8(e[i][1], e[i][2]),
                          _mm512_sub_epi8(e[i][2], e[i][1]), _mm512_sub_epi8(e[i][1], e[i][3])};
    for (int j = 0; j < 4; ++j)
      _mm512_mask_storeu_epi8(out + (4 * i + j) * stride, mask, i == 1 && j == 1 ? f[j] : _mm512_add_epi8(f[j], offset));
  }
}

// A^T m A for 16 output channels: four sums, each 4 times a sum of the convolution.
void output_transform(const int32_t* m, int64_t stride, __m512i out[2][2]) {
  __m512i half[2][4];
  for (int j = 0; j < 4; ++j) {
    __m512i v[4];
    for (int i = 0; i < 4; ++i) v[i] = _mm512_loadu_si512(m + (4 * i + j) * stride);
    half[0][j] = _mm512_add_epi32(_mm512_add_epi32(v[0], v[1]), v[2]);
    half[1][j] = _mm512_sub_epi32(_mm512_sub_epi32(v[1], v[2]), v[3]);
  }
  for (int i = 0; i < 2; ++i) {
    out[i][0] = _mm512_add_epi32(_mm512_add_epi32(half[i][0], half[i][1]), half[i][2]);
    out[i][1] = _mm512_sub_epi32(_mm512_sub_epi32(half[i][1], half[i][2]), half[i][3]);
  }
}

constexpr int64_t kBlock = 64;  // output channels of a block

}  // namespace

extern "C" {

struct Winograd {
  const uint8_t* codes;     // (B, H + 2, W + 2, C), H and W even, C a multiple of 4
  const int8_t* weight;     // by blocks of 64 output channels (the last one up to a multiple of 16): (16, C / 4, block, 4)
  const int32_t* first;     // (16, outputs up to a multiple of 16): what the sums start from
  const float *scale, *bias;  // (outputs up to a multiple of 16): y = sum scale + bias
  const float* residual;    // (B, H, W, O) or null
  float* out;               // (B, H, W, O)
  int64_t batch, height, width, channels, outputs, qmax;
};

void winograd(const Winograd* p) {
  const Winograd& x = *p;
  const int64_t across = x.width / 2, down = x.height / 2, tiles = x.batch * across * down;
  const int64_t padded = up(x.outputs, 16), blocks = (padded + kBlock - 1) / kBlock, threads = omp_get_max_threads();
  const int64_t group = std::min<int64_t>(48, up((tiles + threads - 1) / threads, 6)), groups = (tiles + group - 1) / group;
  // Where there are too few groups of tiles for the threads, the blocks of outputs are shared out too.
  const int64_t shares = groups >= threads ? 1 : std::min(blocks, (threads + groups - 1) / groups);
  const int64_t row = (x.width + 2) * x.channels;
  const __m512i offset = _mm512_set1_epi8(static_cast<char>(2 * x.qmax));
#pragma omp parallel
  {
    auto inputs = buffer<uint8_t>(16 * group * x.channels + 64);
    auto sums = buffer<int32_t>(16 * group * kBlock);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < groups * shares; ++task) {
      const int64_t begin = task / shares * group, count = std::min(group, tiles - begin), share = task % shares;
      const int64_t stride = group * x.channels;
      const auto pixel = [&](int64_t tile, int64_t width, int64_t edge) {  // of a tile's first corner
        const int64_t n = tile / (across * down), y = tile / across % down, column = tile % across;
        return (n * (x.height + edge) + 2 * y) * width + 2 * column;
      };
      for (int64_t t = 0; t < count; ++t)
        for (int64_t c = 0; c < x.channels; c += 64) {
          const __mmask64 mask = x.channels - c >= 64 ? ~0ull : (1ull << (x.channels - c)) - 1;
          input_transform(x.codes + pixel(begin + t, x.width + 2, 2) * x.channels + c, row, x.channels,
                          inputs.get() + t * x.channels + c, stride, mask, offset);
        }
      for (int64_t block = share * blocks / shares; block < (share + 1) * blocks / shares; ++block) {
        const int64_t o = block * kBlock, width = std::min(kBlock, padded - o);
        const int8_t* weight = x.weight + 16 * x.channels * o;
        for (int64_t at = 0; at < 16; ++at)
          multiply_block(inputs.get() + at * stride, x.channels, weight + at * x.channels * width, 4 * width,
                         sums.get() + at * group * kBlock, kBlock, count, x.channels / 4, width / 16, x.first + at * padded + o);
        for (int64_t t = 0; t < count; ++t) {
          const int64_t corner = pixel(begin + t, x.width, 0);
          for (int64_t v = 0; v < width; v += 16) {
            __m512i found[2][2];
            output_transform(sums.get() + t * kBlock + v, group * kBlock, found);
            const int64_t left = std::min<int64_t>(16, x.outputs - o - v);
            const __mmask16 mask = static_cast<__mmask16>((1u << left) - 1);
            const __m512 scale = _mm512_loadu_ps(x.scale + o + v), bias = _mm512_loadu_ps(x.bias + o + v);
            for (int i = 0; i < 2; ++i)
              for (int j = 0; j < 2; ++j) {
                const int64_t at = (corner + i * x.width + j) * x.outputs + o + v;
                __m512 y = _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(found[i][j]), scale), bias);
                if (x.residual) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, x.residual + at));
                _mm512_mask_storeu_ps(x.out + at, mask, y);
              }
          }
        }
      }
    }
  }
}

struct Grid {
  const float *scale, *zero_point;  // one, or one for each sample
  int64_t per_sample, qmax;
};

struct Attention {
  const float *q, *k, *v;  // (B, N, heads d), (B, M, heads d) twice
  float* out;              // (B, N, heads d)
  int64_t batch, heads, queries, keys, width;
  Grid query, key, value, probabilities;  // the probabilities' zero points are 0
};

// softmax(q_hat k_hat^T / sqrt(d)) as codes times v_hat. All zero points lie within +-32767.
void attention(const Attention* p) {
  const Attention& x = *p;
  const int64_t d4 = up(x.width, 4), d16 = up(x.width, 16), m4 = up(x.keys, 4), m16 = up(x.keys, 16);
  const int64_t pairs = x.batch * x.heads, stride = x.heads * x.width, rows = 24, chunks = (x.queries + rows - 1) / rows;
  auto keys = buffer<int8_t>(pairs * d4 * m16), values = buffer<int8_t>(pairs * m4 * d16);
  auto key_sums = buffer<int32_t>(pairs * m16);
  const auto at = [](const Grid& grid, int64_t n, float& s, int32_t& z) {
    s = grid.scale[grid.per_sample ? n : 0];
    z = static_cast<int32_t>(grid.zero_point[grid.per_sample ? n : 0]);
  };
  const auto held = [](const Grid& grid, int32_t z) {  // what an int8 code is less than its uint8 code
    return std::min(std::max(z, static_cast<int32_t>(grid.qmax) - 127), 128);
  };
  const float factor = 1.0f / std::sqrt(static_cast<float>(x.width));
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const int64_t n = pair / x.heads, head = pair % x.heads;
      float s; int32_t z;
      std::vector<uint8_t> line(d16);
      int8_t* own = keys.get() + pair * d4 * m16;
      std::memset(own, 0, d4 * m16);
      int32_t* sums = key_sums.get() + pair * m16;
      std::fill(sums, sums + m16, 0);
      at(x.key, n, s, z);
      for (int64_t j = 0; j < x.keys; ++j) {
        write_codes<false, false>(x.k + (n * x.keys + j) * stride + head * x.width, nullptr, nullptr, x.width, s, z, x.key.qmax, line.data());
        for (int64_t c = 0; c < x.width; ++c) {
          const int8_t moved = static_cast<int8_t>(line[c] - held(x.key, z));
          own[(c / 4 * m16 + j) * 4 + c % 4] = moved;
          sums[j] += moved;
        }
      }
      at(x.value, n, s, z);
      int8_t* second = values.get() + pair * m4 * d16;
      std::memset(second, 0, m4 * d16);
      for (int64_t j = 0; j < x.keys; ++j) {
        write_codes<false, false>(x.v + (n * x.keys + j) * stride + head * x.width, nullptr, nullptr, x.width, s, z, x.value.qmax, line.data());
        for (int64_t c = 0; c < x.width; ++c)
          second[(j / 4 * d16 + c) * 4 + j % 4] = static_cast<int8_t>(line[c] - held(x.value, z));
      }
    }
    auto query = buffer<uint8_t>(rows * d4), probs = buffer<uint8_t>(rows * m4);
    auto scores = buffer<int32_t>(rows * m16), sums = buffer<int32_t>(rows * d16);
    auto line = buffer<float>(m16);
    std::memset(query.get(), 0, rows * d4);
    std::memset(probs.get(), 0, rows * m4);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < pairs * chunks; ++task) {
      const int64_t pair = task / chunks, n = pair / x.heads, head = pair % x.heads, begin = task % chunks * rows;
      const int64_t count = std::min(rows, x.queries - begin);
      float s_q, s_k, s_v, s_p; int32_t z_q, z_k, z_v, z_p;
      at(x.query, n, s_q, z_q); at(x.key, n, s_k, z_k); at(x.value, n, s_v, z_v); at(x.probabilities, n, s_p, z_p);
      const int32_t o_k = z_k - held(x.key, z_k), o_v = z_v - held(x.value, z_v);
      for (int64_t i = 0; i < count; ++i)
        write_codes<false, false>(x.q + (n * x.queries + begin + i) * stride + head * x.width, nullptr, nullptr, x.width, s_q, z_q,
                                  x.query.qmax, query.get() + i * d4);
      for (int64_t j = 0; j < m16; j += 64)
        multiply_block(query.get(), d4, keys.get() + pair * d4 * m16 + 4 * j, 4 * m16, scores.get() + j, m16, count, d4 / 4,
                       std::min<int64_t>(4, (m16 - j) / 16), nullptr);
      const int32_t* key_sum = key_sums.get() + pair * m16;
      int32_t row_sum[24];
      for (int64_t i = 0; i < count; ++i) {
        int32_t own = 0;
        for (int64_t c = 0; c < x.width; ++c) own += query[i * d4 + c];
        const int32_t constant = o_k * (static_cast<int32_t>(x.width) * z_q - own);
        const int32_t* score = scores.get() + i * m16;
        float* value = line.get();
        const float scale = s_q * s_k * factor;
        float most = -INFINITY, total = 0;
#pragma omp simd reduction(max : most)
        for (int64_t j = 0; j < x.keys; ++j) {
          value[j] = static_cast<float>(score[j] - z_q * key_sum[j] + constant) * scale;
          most = std::max(most, value[j]);
        }
#pragma omp simd reduction(+ : total)
        for (int64_t j = 0; j < x.keys; ++j) { value[j] = exponential(value[j] - most); total += value[j]; }
        uint8_t* own_probs = probs.get() + i * m4;
        int32_t sum = 0;
        const float qmax = static_cast<float>(x.probabilities.qmax);
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < x.keys; ++j) {
          own_probs[j] = code(value[j] / total, s_p, 0.0f, qmax);
          sum += own_probs[j];
        }
        row_sum[i] = sum;
      }
      for (int64_t c = 0; c < d16; c += 64)
        multiply_block(probs.get(), m4, values.get() + pair * m4 * d16 + 4 * c, 4 * d16, sums.get() + c, d16, count, m4 / 4,
                       std::min<int64_t>(4, (d16 - c) / 16), nullptr);
      for (int64_t i = 0; i < count; ++i) {
        float* out = x.out + (n * x.queries + begin + i) * stride + head * x.width;
        const int32_t* own = sums.get() + i * d16;
        const float scale = s_p * s_v;
#pragma omp simd
        for (int64_t c = 0; c < x.width; ++c) out[c] = static_cast<float>(own[c] - o_v * row_sum[i]) * scale;
      }
    }
  }
}

}  // extern "C"
#endif
