// Both products of attention on codes, with the softmax between them.
#ifdef VNNI
extern "C" {

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
