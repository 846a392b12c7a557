//! Exponentials and norms of the reverse pass, vectorised.

use slim_kernels::{exp, per_isa};

per_isa! {
    /// Turns log-probabilities, 64 at most, into square roots of the probabilities with the signs
    /// of `signs`, lowest bit first; gives their part of the entropy.
    pub fn signed_roots(values: &mut [f32], signs: u64) -> f64 {
        let mut entropy = 0.0;
        for (bit, value) in values.iter_mut().enumerate() {
            let root = exp(0.5 * *value);
            entropy -= f64::from(root * root * *value);
            *value = if signs >> bit & 1 == 0 { root } else { -root };
        }
        entropy
    }
}

per_isa! {
    /// Turns log-probabilities into `(model's probability - teacher's) * share`.
    pub fn reverse_divergence(model: &mut [f32], teacher: &[f32], share: f32) {
        for (value, teacher) in model.iter_mut().zip(teacher) {
            *value = (exp(*value) - exp(*teacher)) * share;
        }
    }
}

per_isa! {
    /// Turns the log-probabilities of a softmax into probabilities, and the gradients at these into
    /// gradients at the scores; `mean` is the mean of the former under the probabilities.
    pub fn reverse_softmax(probabilities: &mut [f32], gradients: &mut [f32], mean: f32) {
        for (probability, gradient) in probabilities.iter_mut().zip(gradients) {
            *probability = exp(*probability);
            *gradient = *probability * (*gradient - mean);
        }
    }
}

per_isa! {
    /// Replaces `gate` and `up` by their gradients, for the gradient `dy` at `silu(gate) * up`; all
    /// of one length.
    pub fn reverse_swiglu(gate: &mut [f32], up: &mut [f32], dy: &[f32]) {
        for ((gate, up), dy) in gate.iter_mut().zip(up).zip(dy) {
            let sigmoid = 1.0 / (1.0 + exp(-*gate));
            let slope = sigmoid * (1.0 + *gate * (1.0 - sigmoid));
            (*gate, *up) = (dy * *up * slope, dy * *gate * sigmoid);
        }
    }
}

per_isa! {
    /// Adds one token's gradient at the input `x` of a norm to `dx`, and that at its weight to
    /// `d_weight`, for the gradient `dy` at its output; all `[hidden]`.
    pub fn reverse_rms_norm(
        x: &[f32],
        weight: &[f32],
        epsilon: f32,
        dy: &[f32],
        dx: &mut [f32],
        d_weight: &mut [f64],
    ) {
        const LANES: usize = 8;
        let n = weight.len();
        let (mut squares, mut along) = ([0.0; LANES], [0.0; LANES]);
        for ((x, dy), weight) in x.chunks(LANES).zip(dy.chunks(LANES)).zip(weight.chunks(LANES)) {
            for (i, ((x, dy), weight)) in x.iter().zip(dy).zip(weight).enumerate() {
                squares[i] += f64::from(*x) * f64::from(*x);
                along[i] += f64::from(*x) * f64::from(*dy) * f64::from(*weight);
            }
        }
        let mean = squares.iter().sum::<f64>() / n as f64;
        let scale = 1.0 / (mean + f64::from(epsilon)).sqrt();
        let pull = along.iter().sum::<f64>() * scale * scale / n as f64;
        let inputs = x.iter().zip(dy).zip(weight);
        for (((x, dy), weight), (dx, d_weight)) in inputs.zip(dx.iter_mut().zip(d_weight)) {
            let (x, dy) = (f64::from(*x), f64::from(*dy));
            *dx += (scale * (f64::from(*weight) * dy - pull * x)) as f32;
            *d_weight += dy * x * scale;
        }
    }
}
