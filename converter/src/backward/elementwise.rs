//! Exponentials and norms of the reverse pass, vectorised.

use slim_formats::arch::Activation;
use slim_kernels::{exp, input_with_slope, per_isa, with_slope};

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

#[inline(always)]
fn reverse_gated_by(activation: Activation, gate: &mut [f32], up: &mut [f32], dy: &[f32]) {
    for ((gate, up), dy) in gate.iter_mut().zip(up).zip(dy) {
        let (value, slope) = with_slope(activation, *gate);
        let (input, input_slope) = input_with_slope(activation, *up);
        (*gate, *up) = (dy * input * slope, dy * value * input_slope);
    }
}

per_isa! {
    /// Replaces `gate` and `up` by their gradients, for the gradient `dy` at
    /// `activation(gate) * input(up)`; all of one length.
    pub fn reverse_gated(activation: Activation, gate: &mut [f32], up: &mut [f32], dy: &[f32]) {
        // A loop of its own for each, so that it vectorises.
        match activation {
            Activation::Silu => reverse_gated_by(Activation::Silu, gate, up, dy),
            Activation::GeluTanh => reverse_gated_by(Activation::GeluTanh, gate, up, dy),
            Activation::Relu => reverse_gated_by(Activation::Relu, gate, up, dy),
            Activation::ClampedSwish { alpha, limit } => {
                reverse_gated_by(Activation::ClampedSwish { alpha, limit }, gate, up, dy);
            }
        }
    }
}

per_isa! {
    /// Turns the gradient `dy` at `activation(x)` into that at `x`; both of one length.
    pub fn reverse_activation(activation: Activation, x: &[f32], dy: &mut [f32]) {
        for (dy, x) in dy.iter_mut().zip(x) {
            *dy *= with_slope(activation, *x).1;
        }
    }
}

per_isa! {
    /// Turns gradients at `cap * tanh(x / cap)`, whose values are `capped`, into those at `x`.
    pub fn reverse_cap(capped: &[f32], cap: f32, gradients: &mut [f32]) {
        for (gradient, capped) in gradients.iter_mut().zip(capped) {
            let tanh = capped / cap;
            *gradient *= 1.0 - tanh * tanh;
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

per_isa! {
    /// As [`reverse_rms_norm`] for a LayerNorm.
    pub fn reverse_layer_norm(
        x: &[f32],
        weight: &[f32],
        epsilon: f32,
        dy: &[f32],
        dx: &mut [f32],
        d_weight: &mut [f64],
    ) {
        let n = weight.len() as f64;
        let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
        let squares = x.iter().map(|&x| (f64::from(x) - mean) * (f64::from(x) - mean));
        let scale = 1.0 / (squares.sum::<f64>() / n + f64::from(epsilon)).sqrt();
        let (mut pull, mut along) = (0.0, 0.0);
        for ((x, dy), weight) in x.iter().zip(dy).zip(weight) {
            let gradient = f64::from(*dy) * f64::from(*weight);
            pull += gradient / n;
            along += gradient * (f64::from(*x) - mean) * scale / n;
        }
        let inputs = x.iter().zip(dy).zip(weight);
        for (((x, dy), weight), (dx, d_weight)) in inputs.zip(dx.iter_mut().zip(d_weight)) {
            let (normed, dy) = ((f64::from(*x) - mean) * scale, f64::from(*dy));
            *dx += (scale * (f64::from(*weight) * dy - pull - normed * along)) as f32;
            *d_weight += dy * normed;
        }
    }
}
