// Activations to codes: group norm, SiLU, rounding to the grid and the padding of the convolution, in one call.
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
