//! Norm, rotation, SwiGLU, softmax: one token at a time.

/// `e^x` for `x <= 0` (and moderate positive `x`), relative error below 2e-7: `2^i * p(f)` with a degree 6 polynomial on
/// `[-ln 2 / 2, ln 2 / 2]`. Branch-free, so that loops over it vectorise.
#[inline(always)]
fn exp(x: f32) -> f32 {
    let x = x.clamp(-87.0, 88.0);
    let i = (x * std::f32::consts::LOG2_E + 12_582_912.0) - 12_582_912.0; // 1.5 * 2^23 rounds to an integer
    let f = (x - i * 0.693_359_4) + i * 2.121_944_4e-4; // ln 2 in two parts
    let p = 1.0
        + f * (1.0 + f * (0.5 + f * (1.0 / 6.0 + f * (1.0 / 24.0 + f * (1.0 / 120.0 + f / 720.0)))));
    p * f32::from_bits(((i as i32 + 127) << 23) as u32)
}

/// Sums over a vocabulary are f64 sums of f32 sums over pieces of this many values: their error does not grow with it.
const PIECE: usize = 512;

/// Sums in eight lanes, so that the loop vectorises.
#[inline(always)]
fn lane_sum(values: impl Iterator<Item = f32>) -> f32 {
    let mut lanes = [0.0; 8];
    for (i, value) in values.enumerate() {
        lanes[i % 8] += value;
    }
    lanes.iter().sum()
}

per_isa! {
    pub fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
        let mean = lane_sum(x.iter().map(|x| x * x)) / x.len() as f32;
        let scale = 1.0 / (mean + epsilon).sqrt();
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * scale * weight;
        }
    }
}

per_isa! {
    pub fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32]) {
        let (first, second) = head.split_at_mut(cos.len());
        for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }
}

per_isa! {
    pub fn swiglu(gate: &mut [f32], up: &[f32]) {
        for (gate, up) in gate.iter_mut().zip(up) {
            *gate = *gate / (1.0 + exp(-*gate)) * up;
        }
    }
}

per_isa! {
    /// Turns scores into probabilities in place.
    pub fn softmax(scores: &mut [f32]) {
        let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        for score in scores.iter_mut() {
            *score = exp(*score - max);
        }
        let scale = 1.0 / lane_sum(scores.iter().copied());
        for score in scores {
            *score *= scale;
        }
    }
}

per_isa! {
    /// Turns logits into log-probabilities in place.
    pub fn log_softmax(logits: &mut [f32]) {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut sum = 0.0;
        for piece in logits.chunks(PIECE) {
            sum += f64::from(lane_sum(piece.iter().map(|logit| exp(logit - max))));
        }
        let log_sum = max + sum.ln() as f32;
        for logit in logits {
            *logit -= log_sum;
        }
    }
}

per_isa! {
    /// KL(p || q) in nats, of log-probabilities.
    pub fn kl_divergence(log_p: &[f32], log_q: &[f32]) -> f64 {
        let mut sum = 0.0;
        for (p, q) in log_p.chunks(PIECE).zip(log_q.chunks(PIECE)) {
            sum += f64::from(lane_sum(p.iter().zip(q).map(|(p, q)| exp(*p) * (p - q))));
        }
        sum
    }
}
