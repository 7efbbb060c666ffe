// The arithmetic of the optimizers on 16 elements in fp32, included by kernels_body.h. A rule has
// kHasMoments, kHasSquares (whether it uses exp_avg_sq) and step(), which is told the number of the
// first element in its chunk; its scalars are in every lane, so that a loop keeps them in
// registers.

// The shape of every line is that of torch's fused CPU kernel, and so is which multiply-adds are
// fused: lerp and the second moment are, the update of the weight is not. This was found by trying
// all combinations against torch 2.13 (its AVX2 and AVX-512 code agree). torch adds elements beyond
// the last full vector of a tensor in other precision; those can differ from here by one unit in
// the last place.
template <bool kLerpFromGrad>
struct AdamwRule {
  static constexpr bool kHasMoments = true;
  static constexpr bool kHasSquares = true;
  Lanes grad_scale, decay, lerp, beta2, grad_sq_weight, correction_sqrt, eps, step_size;

  explicit AdamwRule(const AdamwScalars& s)
      : grad_scale(broadcast(s.grad_scale)),
        decay(broadcast(s.decay)),
        lerp(broadcast(kLerpFromGrad ? s.lerp_weight - 1.0f : s.lerp_weight)),
        beta2(broadcast(s.beta2)),
        grad_sq_weight(broadcast(s.grad_sq_weight)),
        correction_sqrt(broadcast(s.correction_sqrt)),
        eps(broadcast(s.eps)),
        step_size(broadcast(s.step_size)) {}

  void step(uint64_t, Lanes grad, Lanes& weight, Lanes& exp_avg, Lanes& exp_avg_sq) const {
    grad = mul(grad, grad_scale);
    weight = mul(weight, decay);
    exp_avg = fma(lerp, sub(grad, exp_avg), kLerpFromGrad ? grad : exp_avg);
    exp_avg_sq = fma(mul(grad_sq_weight, grad), grad, mul(exp_avg_sq, beta2));
    const Lanes denominator = add(div(sqrt(exp_avg_sq), correction_sqrt), eps);
    weight = add(weight, div(mul(step_size, exp_avg), denominator));
  }
};

// torch.optim.SGD: every multiply-add is fused there, in its fused, foreach and plain code alike.
struct SgdRule {
  static constexpr bool kHasMoments = true;
  static constexpr bool kHasSquares = false;
  Lanes grad_scale, weight_decay, momentum, grad_weight, negative_lr;
  bool has_weight_decay, has_momentum, is_first, nesterov;

  explicit SgdRule(const SgdScalars& s)
      : grad_scale(broadcast(s.grad_scale)),
        weight_decay(broadcast(s.weight_decay)),
        momentum(broadcast(s.momentum)),
        grad_weight(broadcast(s.grad_weight)),
        negative_lr(broadcast(s.negative_lr)),
        has_weight_decay(s.has_weight_decay),
        has_momentum(s.has_momentum),
        is_first(s.is_first),
        nesterov(s.nesterov) {}

  void step(uint64_t, Lanes grad, Lanes& weight, Lanes& exp_avg, Lanes&) const {
    grad = mul(grad, grad_scale);
    if (has_weight_decay) {
      grad = fma(weight, weight_decay, grad);
    }
    if (has_momentum) {
      exp_avg = is_first ? grad : fma(grad, grad_weight, mul(exp_avg, momentum));
      grad = nesterov ? fma(exp_avg, momentum, grad) : exp_avg;
    }
    weight = fma(grad, negative_lr, weight);
  }
};

// Lion (arXiv 2302.06675), rounded as its authors' PyTorch code is.
struct LionRule {
  static constexpr bool kHasMoments = true;
  static constexpr bool kHasSquares = false;
  Lanes grad_scale, decay, beta1, grad_weight1, beta2, grad_weight2, negative_lr;

  explicit LionRule(const LionScalars& s)
      : grad_scale(broadcast(s.grad_scale)),
        decay(broadcast(s.decay)),
        beta1(broadcast(s.beta1)),
        grad_weight1(broadcast(s.grad_weight1)),
        beta2(broadcast(s.beta2)),
        grad_weight2(broadcast(s.grad_weight2)),
        negative_lr(broadcast(s.negative_lr)) {}

  void step(uint64_t, Lanes grad, Lanes& weight, Lanes& exp_avg, Lanes&) const {
    grad = mul(grad, grad_scale);
    const Lanes direction = sign(fma(grad, grad_weight1, mul(exp_avg, beta1)));
    weight = fma(direction, negative_lr, mul(weight, decay));
    exp_avg = fma(grad, grad_weight2, mul(exp_avg, beta2));
  }
};

// See [Note: factored].
struct Factors {
  const float* rows;
  const float* cols;
  MatrixShape shape;
  uint64_t begin, numel;

  explicit Factors(const FactoredScalars& s)
      : rows(s.rows), cols(s.cols), shape(s.shape), begin(s.begin), numel(s.numel) {}

  // The products for 16 elements of the chunk, from `element` on.
  Lanes products(uint64_t element) const {
    const uint64_t at = element - begin, row = at / shape.num_cols, col = at - row * shape.num_cols;
    if (at < numel && col + kLanes <= shape.num_cols) {
      const float* columns = cols + row / shape.num_rows * shape.num_cols;
      return mul(broadcast(rows[row]), load(columns + col));
    }
    return mul(load(gathered(at, row, col, true).values),
               load(gathered(at, row, col, false).values));
  }

  // The factors of rows or columns where 16 elements are not all of one row.
  Padded<float> gathered(uint64_t at, uint64_t row, uint64_t col, bool of_rows) const {
    Padded<float> result;
    for (size_t j = 0; j < kLanes && at + j < numel; ++j) {
      result.values[j] = of_rows ? rows[row] : cols[row / shape.num_rows * shape.num_cols + col];
      if (++col == shape.num_cols) {
        col = 0;
        ++row;
      }
    }
    return result;
  }
};

struct FactoredRule {
  static constexpr bool kHasMoments = true;
  static constexpr bool kHasSquares = false;
  Lanes grad_scale, decay, lerp, eps_sq, negative_lr;
  Factors factors;

  explicit FactoredRule(const FactoredScalars& s)
      : grad_scale(broadcast(s.grad_scale)),
        decay(broadcast(s.decay)),
        lerp(broadcast(s.lerp_weight)),
        eps_sq(broadcast(s.eps_sq)),
        negative_lr(broadcast(s.negative_lr)),
        factors(s) {}

  void step(uint64_t element, Lanes grad, Lanes& weight, Lanes& exp_avg, Lanes&) const {
    const Lanes root = sqrt(max(factors.products(element), eps_sq));
    const Lanes direction = div(mul(grad, grad_scale), root);
    exp_avg = fma(lerp, sub(direction, exp_avg), exp_avg);
    weight = fma(exp_avg, negative_lr, mul(weight, decay));
  }
};

// SGD on normalised rows or columns; with `is_direct` the products are the step itself.
struct ScaledRule {
  static constexpr bool kHasMoments = false;
  static constexpr bool kHasSquares = false;
  Lanes grad_scale, decay, eps_sq, negative_lr;
  bool is_direct;
  Factors factors;

  explicit ScaledRule(const FactoredScalars& s)
      : grad_scale(broadcast(s.grad_scale)),
        decay(broadcast(s.decay)),
        eps_sq(broadcast(s.eps_sq)),
        negative_lr(broadcast(s.negative_lr)),
        is_direct(s.is_direct),
        factors(s) {}

  void step(uint64_t element, Lanes grad, Lanes& weight, Lanes&, Lanes&) const {
    Lanes direction = factors.products(element);
    if (!is_direct) {
      direction = div(mul(grad, grad_scale), sqrt(max(direction, eps_sq)));
    }
    weight = fma(direction, negative_lr, mul(weight, decay));
  }
};
