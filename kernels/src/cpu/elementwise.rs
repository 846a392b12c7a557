//! Norms, rotation, activations, softmax: one token at a time.

use slim_formats::arch::Activation;

/// `e^x` for `x <= 0` (and moderate positive `x`), relative error below 2e-7: `2^i * p(f)` with a
/// degree 6 polynomial on `[-ln 2 / 2, ln 2 / 2]`. Branch-free, so that loops over it vectorise.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: a sum with it has no bits left for a fraction
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let i = shifted - ROUND;
    let f = (x - i * 0.693_359_4) + i * 2.121_944_4e-4; // ln 2 in two parts
    let p = 1.0
        + f * (1.0
            + f * (0.5 + f * (1.0 / 6.0 + f * (1.0 / 24.0 + f * (1.0 / 120.0 + f / 720.0)))));
    // `i` stands in the low bits of `shifted`: a cast of `i` itself would not vectorise.
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127);
    p * f32::from_bits(exponent << 23)
}

/// Sums over a vocabulary are f64 sums of f32 sums over pieces of this many values: their error
/// does not grow with it.
const PIECE: usize = 512;

/// Values that are combined side by side, so that sums and maxima vectorise.
const LANES: usize = 16;

#[inline(always)]
fn sum(values: &[f32]) -> f32 {
    let (chunks, rest) = values.as_chunks::<LANES>();
    let mut lanes = [0.0; LANES];
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] += chunk[i];
        }
    }
    let mut sum = 0.0;
    for value in lanes.iter().chain(rest) {
        sum += value;
    }
    sum
}

#[inline(always)]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut lanes = [0.0; LANES];
    for (a, b) in a.iter().zip(b) {
        for i in 0..LANES {
            lanes[i] += a[i] * b[i];
        }
    }
    // By halves: one after the other, 16 sums would take longer than the products.
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
    }
    lanes[0] + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f32>()
}

#[inline(always)]
fn max(values: &[f32]) -> f32 {
    let (chunks, rest) = values.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] = if chunk[i] > lanes[i] { chunk[i] } else { lanes[i] };
        }
    }
    let mut max = f32::NEG_INFINITY;
    for value in lanes.iter().chain(rest) {
        max = max.max(*value);
    }
    max
}

per_isa! {
    pub fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
        for (out, x) in out.iter_mut().zip(x) {
            *out = x * x;
        }
        let scale = 1.0 / (sum(out) / x.len() as f32 + epsilon).sqrt();
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * scale * weight;
        }
    }
}

per_isa! {
    pub fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], epsilon: f32, out: &mut [f32]) {
        let mean = sum(x) / x.len() as f32;
        for (out, x) in out.iter_mut().zip(x) {
            *out = (x - mean) * (x - mean);
        }
        let scale = 1.0 / (sum(out) / x.len() as f32 + epsilon).sqrt();
        for (((out, x), weight), bias) in out.iter_mut().zip(x).zip(weight).zip(bias) {
            *out = (x - mean) * scale * weight + bias;
        }
    }
}

per_isa! {
    /// Turns the first `2 * cos.len()` channels.
    pub fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32]) {
        let (first, second) = head.split_at_mut(cos.len());
        for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }
}

/// `tanh(x)`, by [`exp`].
#[inline(always)]
fn tanh(x: f32) -> f32 {
    1.0 - 2.0 / (exp(2.0 * x.clamp(-40.0, 40.0)) + 1.0)
}

/// `x / (1 + e^(-alpha x))`.
#[inline(always)]
fn swish(alpha: f32, x: f32) -> f32 {
    x / (1.0 + exp(-alpha * x))
}

#[inline(always)]
fn silu(x: f32) -> f32 {
    swish(1.0, x)
}

/// What a neuron's input becomes that is at most `limit`.
#[inline(always)]
fn clamped_input(limit: f32, up: f32) -> f32 {
    1.0 + up.max(-limit).min(limit)
}

/// `sqrt(2 / pi)`.
const GELU_SLOPE: f32 = 0.797_884_6;
const GELU_CUBE: f32 = 0.044_715;

#[inline(always)]
fn gelu(x: f32) -> f32 {
    x * gelu_share(x)
}

/// What GELU leaves of `x`.
#[inline(always)]
fn gelu_share(x: f32) -> f32 {
    0.5 * (1.0 + tanh(GELU_SLOPE * (x + GELU_CUBE * x * x * x)))
}

/// `(activation(x), its slope at x)`.
#[inline(always)]
pub fn with_slope(activation: Activation, x: f32) -> (f32, f32) {
    match activation {
        Activation::Silu => swish_with_slope(1.0, x),
        Activation::GeluTanh => {
            let share = gelu_share(x);
            let inner = GELU_SLOPE * (1.0 + 3.0 * GELU_CUBE * x * x);
            (x * share, share + 2.0 * x * share * (1.0 - share) * inner)
        }
        Activation::Relu => (x.max(0.0), if x > 0.0 { 1.0 } else { 0.0 }),
        Activation::ClampedSwish { alpha, limit } => {
            let (value, slope) = swish_with_slope(alpha, x.min(limit));
            (value, if x > limit { 0.0 } else { slope })
        }
    }
}

#[inline(always)]
fn swish_with_slope(alpha: f32, x: f32) -> (f32, f32) {
    let sigmoid = 1.0 / (1.0 + exp(-alpha * x));
    (x * sigmoid, sigmoid * (1.0 + alpha * x * (1.0 - sigmoid)))
}

/// `(input(up), its slope at up)`, of what is multiplied by the activation of a gate.
#[inline(always)]
pub fn input_with_slope(activation: Activation, up: f32) -> (f32, f32) {
    match activation {
        Activation::ClampedSwish { limit, .. } => {
            (clamped_input(limit, up), if up.abs() > limit { 0.0 } else { 1.0 })
        }
        _ => (up, 1.0),
    }
}

per_isa! {
    pub fn gated(activation: Activation, gate: &mut [f32], up: &[f32]) {
        // A loop of its own for each, so that it vectorises.
        let pairs = gate.iter_mut().zip(up);
        match activation {
            Activation::Silu => {
                for (gate, up) in pairs {
                    *gate = silu(*gate) * up;
                }
            }
            Activation::GeluTanh => {
                for (gate, up) in pairs {
                    *gate = gelu(*gate) * up;
                }
            }
            Activation::Relu => {
                for (gate, up) in pairs {
                    *gate = gate.max(0.0) * up;
                }
            }
            Activation::ClampedSwish { alpha, limit } => {
                for (gate, up) in pairs {
                    *gate = swish(alpha, gate.min(limit)) * clamped_input(limit, *up);
                }
            }
        }
    }
}

per_isa! {
    pub fn activate(activation: Activation, x: &mut [f32]) {
        match activation {
            Activation::Silu => {
                for x in x {
                    *x = silu(*x);
                }
            }
            Activation::GeluTanh => {
                for x in x {
                    *x = gelu(*x);
                }
            }
            Activation::Relu => {
                for x in x {
                    *x = x.max(0.0);
                }
            }
            Activation::ClampedSwish { alpha, limit } => {
                for x in x {
                    *x = swish(alpha, x.min(limit));
                }
            }
        }
    }
}

per_isa! {
    /// `cap * tanh(x / cap)` in place.
    pub fn cap(x: &mut [f32], cap: f32) {
        for x in x {
            *x = cap * tanh(*x / cap);
        }
    }
}

per_isa! {
    /// The largest value; of none, negative infinity.
    pub fn largest(values: &[f32]) -> f32 {
        max(values)
    }
}

per_isa! {
    /// Turns scores into `e^(score - max)` in place; gives their sum.
    pub fn exponentiate(scores: &mut [f32], max: f32) -> f32 {
        for score in scores.iter_mut() {
            *score = exp(*score - max);
        }
        sum(scores)
    }
}

per_isa! {
    /// Turns logits into log-probabilities in place.
    pub fn log_softmax(logits: &mut [f32]) {
        let max = max(logits);
        let mut powers = [0.0; PIECE];
        let mut total = 0.0;
        for piece in logits.chunks(PIECE) {
            for (power, logit) in powers.iter_mut().zip(piece) {
                *power = exp(logit - max);
            }
            total += f64::from(sum(&powers[..piece.len()]));
        }
        let log_sum = max + total.ln() as f32;
        for logit in logits {
            *logit -= log_sum;
        }
    }
}

per_isa! {
    /// KL(p || q) in nats, of log-probabilities.
    pub fn kl_divergence(log_p: &[f32], log_q: &[f32]) -> f64 {
        let mut terms = [0.0; PIECE];
        let mut total = 0.0;
        for (p, q) in log_p.chunks(PIECE).zip(log_q.chunks(PIECE)) {
            for ((term, p), q) in terms.iter_mut().zip(p).zip(q) {
                *term = exp(*p) * (p - q);
            }
            total += f64::from(sum(&terms[..p.len()]));
        }
        total
    }
}
