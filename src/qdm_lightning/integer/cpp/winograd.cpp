// The convolution of narrow codes by Winograd's F(2x2, 3x3) on integers.
#ifdef VNNI
namespace {

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

}  // extern "C"
#endif
