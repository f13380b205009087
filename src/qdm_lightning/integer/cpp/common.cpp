// What oneDNN has no kernel for. native.py compiles the files of this folder as one: common, encode, winograd, attention.
// Plain C interface. Activations are channels-last: (B, H, W, C) in memory.
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

extern "C" int has_vnni() {
#ifdef VNNI
  return 1;
#else
  return 0;
#endif
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

}  // namespace
#endif
