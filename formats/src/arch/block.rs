//! What a transformer block computes.

use super::{Attention, ExpertPart, Experts, Mixer, Part};

/// What one block computes; blocks of a model may differ.
///
/// With `x` the residual stream:
/// `x = sum(x + residual_scale * post(mixer(pre(x))))`, then
/// `x = sum(x + residual_scale * post(ffn(pre(x)) + experts(pre(x))))`.
/// [`Norms`] tells which of the norms `pre`, `post` and `sum` there are; with experts, only `pre`,
/// unless these have norms of their own: then `post(norm(ffn(pre(x))) + norm(experts(norm(x))))`.
/// With an embedding of its own, `x = x + post(output(activation(gate(x)) * embedded))` follows.
/// At last `x` is scaled, in blocks that do that.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BlockSpec {
    /// How norms of the residual stream are computed.
    pub norm: Norm,
    /// Where they stand.
    pub norms: Norms,
    /// How tokens learn of those before them.
    pub mixer: Mixer,
    /// The network that each token goes through by itself; with experts, the one beside them, if
    /// there is one.
    pub ffn: Option<Ffn>,
    /// Networks of which each token goes through some.
    pub experts: Option<Experts>,
    /// What mixer and network are multiplied by before they are added to the residual stream.
    pub residual_scale: f32,
    /// Channels of what each token says to the block by itself, if it does.
    pub embedded: Option<usize>,
    /// Whether its output is multiplied by a number that it has.
    pub is_scaled: bool,
}

/// How a vector is normalized.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Norm {
    /// `x / sqrt(mean(x^2) + epsilon) * weight`.
    Rms,
    /// `(x - mean(x)) / sqrt(variance(x) + epsilon) * weight + bias`.
    Layer,
}

/// Where the norms of a block stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Norms {
    /// `pre`: before the mixer and before the network.
    Before,
    /// `post`: behind each.
    Behind,
    /// `pre` and `post`.
    Both,
    /// `sum`: on the residual stream itself, when each has been added to it.
    OnSum,
}

impl Activation {
    /// Hugging Face's names, the first of which is written.
    pub(crate) fn hf_names(self) -> &'static [&'static str] {
        match self {
            // What is clamped, and how, only the class says.
            Self::Silu | Self::ClampedSwish { .. } => &["silu", "swish"],
            Self::GeluTanh => &["gelu_pytorch_tanh", "gelu_new"],
            Self::Relu => &["relu"],
        }
    }
}

/// `down(activation(gate) * input(up))`, or `down(activation(up))` without a gate; `input(up)` is
/// `up` itself but for [`Activation::ClampedSwish`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ffn {
    /// Neurons.
    pub width: usize,
    /// What makes it nonlinear.
    pub activation: Activation,
    /// Whether neurons have a gate.
    pub is_gated: bool,
    /// Whether its linear layers have biases.
    pub has_bias: bool,
}

/// A function of one number.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Activation {
    /// `x / (1 + e^-x)`.
    Silu,
    /// `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))`.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
    /// `y / (1 + e^(-alpha y))` of `y = min(x, limit)`, and of what it gates
    /// `input(up) = 1 + clamp(up, -limit, limit)` (gpt-oss).
    ClampedSwish {
        /// How steep it is.
        alpha: f32,
        /// What goes in at most.
        limit: f32,
    },
}

/// Where the input of one or more linear layers is ready. A block is run stage by stage; it is
/// calibrated between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stage {
    /// The residual stream, normed if norms stand before, for the mixer.
    Mixer,
    /// What queries of latent attention are made of, normed.
    Query,
    /// The latent, normed, for keys and values.
    Latent,
    /// What the mixer gives.
    MixerOutput,
    /// The residual stream, normed if norms stand before, for the feed-forward network.
    Ffn,
    /// The activations of neurons.
    FfnOutput,
    /// The residual stream, normed, for a router with a norm of its own.
    Router,
    /// The residual stream, normed, for experts with a norm of their own.
    Experts,
    /// The input of [`Self::Ffn`] or [`Self::Experts`] for the tokens that go through an expert.
    Expert(u16),
    /// The activations of an expert's neurons, times the weights of its tokens.
    ExpertOutput(u16),
    /// The residual stream, for what gates what tokens say by themselves.
    Embedded,
    /// That, gated.
    EmbeddedOutput,
}

impl Stage {
    /// Whether its input is made of the residual stream, not of the stage before.
    pub fn reads_residual(self) -> bool {
        matches!(self, Self::Mixer | Self::Ffn | Self::Router | Self::Experts | Self::Embedded)
    }

    /// Whether what its layers give is added to the residual stream.
    pub fn adds_to_residual(self) -> bool {
        matches!(
            self,
            Self::MixerOutput | Self::FfnOutput | Self::ExpertOutput(_) | Self::EmbeddedOutput
        )
    }

    /// The norm that makes its input, if norms stand before.
    pub fn norm(self) -> Option<Part> {
        match self {
            Self::Mixer => Some(Part::AttnNorm),
            Self::Ffn => Some(Part::FfnNorm),
            Self::Router => Some(Part::RouterNorm),
            Self::Experts => Some(Part::ExpertsNorm),
            _ => None,
        }
    }

    /// Whether it is one of experts, or of what chooses them.
    pub fn is_of_experts(self) -> bool {
        matches!(self, Self::Router | Self::Experts | Self::Expert(_) | Self::ExpertOutput(_))
    }

    /// The norm behind what it adds to, if norms stand behind.
    fn post_norm(self) -> Option<Part> {
        match self {
            Self::MixerOutput => Some(Part::AttnPostNorm),
            Self::FfnOutput => Some(Part::FfnPostNorm),
            _ => None,
        }
    }
}

impl BlockSpec {
    /// The attention of the block, if that is its mixer.
    pub fn attention(&self) -> Option<&Attention> {
        match &self.mixer {
            Mixer::Attention(attention) => Some(attention),
            Mixer::Latent(_) | Mixer::DeltaNet(_) | Mixer::Convolution(_) => None,
        }
    }

    /// The block whose keys and values it attends to, if it has none of its own.
    pub fn shares(&self) -> Option<usize> {
        self.attention()?.shares
    }

    /// Changes its attention, if it has one.
    pub(super) fn attends(&mut self, change: impl FnOnce(&mut Attention)) {
        if let Mixer::Attention(attention) = &mut self.mixer {
            change(attention);
        }
    }

    /// What makes the networks of the block nonlinear.
    pub fn activation(&self) -> Activation {
        let ffn = self.ffn.or(self.experts.map(|experts| experts.ffn));
        ffn.map_or(Activation::Silu, |ffn| ffn.activation)
    }

    /// Gives its network another activation, with a gate or without.
    pub(super) fn activates_by(&mut self, activation: Activation, is_gated: bool) {
        self.ffn = self.ffn.map(|ffn| Ffn { activation, is_gated, ..ffn });
    }

    /// Whether its experts have norms of their own.
    pub fn has_expert_norms(&self) -> bool {
        self.experts.is_some_and(|experts| experts.has_norms)
    }

    /// What the layer of a stage is multiplied by where it is added.
    pub fn scale_of(&self, stage: Stage) -> f32 {
        match stage {
            Stage::FfnOutput | Stage::ExpertOutput(_) if self.has_expert_norms() => 1.0,
            Stage::EmbeddedOutput => 1.0,
            _ => self.residual_scale,
        }
    }

    /// The stages, in the order in which data flows through them.
    pub fn stages(&self) -> impl Iterator<Item = Stage> + use<> {
        let ffn_output = self.ffn.map(|_| Stage::FfnOutput);
        let routed: &[Stage] = match self.has_expert_norms() {
            true => &[Stage::Router, Stage::Experts],
            false => &[],
        };
        let embedded: &[Stage] = match self.embedded {
            Some(_) => &[Stage::Embedded, Stage::EmbeddedOutput],
            None => &[],
        };
        let experts = self.experts.map_or(0, |experts| experts.count);
        let latent = self.mixer.latent();
        let query = latent.and_then(|latent| latent.query_rank).map(|_| Stage::Query);
        let of_mixer = std::iter::once(Stage::Mixer)
            .chain(query)
            .chain(latent.map(|_| Stage::Latent))
            .chain([Stage::MixerOutput]);
        let of_experts =
            (0..experts).flat_map(|index| [Stage::Expert(index), Stage::ExpertOutput(index)]);
        let of_networks = [Stage::Ffn].into_iter().chain(ffn_output);
        let of_networks = of_networks.chain(routed.iter().copied()).chain(of_experts);
        of_mixer.chain(of_networks).chain(embedded.iter().copied())
    }

    /// The norm of what the layer of a stage gives, if one stands there.
    pub fn branch_norm(&self, stage: Stage) -> Option<Part> {
        match stage {
            Stage::FfnOutput if self.has_expert_norms() => Some(Part::BesidePostNorm),
            Stage::EmbeddedOutput => Some(Part::EmbeddedPostNorm),
            _ => stage.post_norm().filter(|_| matches!(self.norms, Norms::Behind | Norms::Both)),
        }
    }

    /// The norm of the residual stream to which a stage has added, if one stands there.
    pub fn sum_norm(&self, stage: Stage) -> Option<Part> {
        stage.post_norm().filter(|_| self.norms == Norms::OnSum)
    }

    /// The linear layers that take a stage in.
    pub fn layers_of(&self, stage: Stage) -> Vec<Part> {
        match stage {
            Stage::Mixer => self.mixer.layers(),
            Stage::Query => vec![Part::AttnQ],
            Stage::Latent => vec![Part::LatentKeys, Part::LatentValues],
            Stage::Router => vec![Part::Router],
            Stage::Experts => Vec::new(),
            Stage::Embedded => vec![Part::EmbeddedGate],
            Stage::Ffn => {
                let router = self.experts.filter(|experts| !experts.has_norms);
                let router = router.map(|_| Part::Router);
                let gate = self.ffn.filter(|ffn| ffn.is_gated).map(|_| Part::FfnGate);
                let up = self.ffn.map(|_| Part::FfnUp);
                router.into_iter().chain(gate).chain(up).collect()
            }
            Stage::Expert(index) => {
                let is_gated = self.experts.is_some_and(|experts| experts.ffn.is_gated);
                let gate = is_gated.then_some(Part::Expert(index, ExpertPart::Gate));
                gate.into_iter().chain([Part::Expert(index, ExpertPart::Up)]).collect()
            }
            Stage::MixerOutput
            | Stage::FfnOutput
            | Stage::ExpertOutput(_)
            | Stage::EmbeddedOutput => self.output_layer(stage).into_iter().collect(),
        }
    }

    /// The linear layer through which a stage adds to the residual stream.
    pub fn output_layer(&self, stage: Stage) -> Option<Part> {
        match stage {
            Stage::MixerOutput => Some(Part::AttnOutput),
            Stage::FfnOutput => Some(Part::FfnDown),
            Stage::ExpertOutput(index) => Some(Part::Expert(index, ExpertPart::Down)),
            Stage::EmbeddedOutput => Some(Part::EmbeddedOutput),
            _ => None,
        }
    }

    /// All linear layers, stage by stage.
    pub fn layers(&self) -> impl Iterator<Item = Part> {
        self.stages().flat_map(|stage| self.layers_of(stage))
    }

    /// The vectors: norms, biases and what else has no columns.
    pub fn vectors(&self) -> impl Iterator<Item = Part> {
        let before = matches!(self.norms, Norms::Before | Norms::Both);
        let behind = self.norms != Norms::Before;
        let norms = [
            (before, Part::AttnNorm),
            (behind, Part::AttnPostNorm),
            (before, Part::FfnNorm),
            (behind, Part::FfnPostNorm),
        ];
        let norms = norms.into_iter().filter_map(|(is_there, part)| is_there.then_some(part));
        let norm_biases = norms.clone().filter_map(Part::bias).filter(|_| self.norm == Norm::Layer);
        let biases = self.layers().filter(|&part| self.has_bias(part)).filter_map(Part::bias);
        let correction = self.experts.filter(|experts| experts.routing.is_corrected);
        let correction = correction.map(|_| Part::RouterCorrection);
        let share = self.experts.filter(|experts| experts.shares).map(|_| Part::FfnShare);
        let of_experts: &[Part] = match self.has_expert_norms() {
            true => &[
                Part::RouterNorm,
                Part::ExpertScale,
                Part::BesidePostNorm,
                Part::ExpertsNorm,
                Part::ExpertsPostNorm,
            ],
            false => &[],
        };
        let embedded = self.embedded.map(|_| Part::EmbeddedPostNorm);
        let scale = self.is_scaled.then_some(Part::BlockScale);
        let others = correction.into_iter().chain(share).chain(of_experts.iter().copied());
        let others = others.chain(embedded).chain(scale);
        norms.chain(norm_biases).chain(self.mixer.vectors()).chain(biases).chain(others)
    }

    /// Whether a linear layer has a bias.
    pub fn has_bias(&self, layer: Part) -> bool {
        match layer {
            Part::AttnQ | Part::AttnK | Part::AttnV => {
                self.attention().is_some_and(|attention| attention.has_bias)
            }
            Part::AttnOutput => self.attention().is_some_and(|attention| attention.has_output_bias),
            Part::DeltaDecay => true,
            Part::FfnGate | Part::FfnUp | Part::FfnDown => self.ffn.is_some_and(|ffn| ffn.has_bias),
            Part::Router => self.experts.is_some_and(|experts| experts.routing.has_bias),
            Part::Expert(..) => self.experts.is_some_and(|experts| experts.ffn.has_bias),
            _ => false,
        }
    }

    /// All parts: vectors, linear layers, and the taps of a convolution.
    pub fn parts(&self) -> impl Iterator<Item = Part> {
        let taps = self.mixer.convolved_channels(0).map(|_| Part::Convolution);
        self.vectors().chain(self.layers()).chain(taps)
    }

    /// Whether a part is in the block.
    pub fn has(&self, part: Part) -> bool {
        self.parts().any(|found| found == part)
    }

    /// The dimensions of a part, outermost first: `[length]` of a vector, `[rows, cols]` of a
    /// matrix.
    ///
    /// # Panics
    /// For a part of other blocks, and outside of blocks.
    pub(super) fn dims(&self, part: Part, hidden_size: usize) -> Vec<usize> {
        let Self { ffn, experts, .. } = self;
        if let Some(dims) = self.mixer.dims(part, hidden_size) {
            return dims;
        }
        let neurons = ffn.map_or(0, |ffn| ffn.width);
        let (experts, of_expert) =
            experts.map_or((0, 0), |experts| (usize::from(experts.count), experts.ffn.width));
        match part {
            Part::FfnGate | Part::FfnUp => vec![neurons, hidden_size],
            Part::FfnDown => vec![hidden_size, neurons],
            Part::Router => vec![experts, hidden_size],
            Part::RouterBias | Part::RouterCorrection | Part::ExpertScale => vec![experts],
            Part::Expert(_, part) => match part {
                ExpertPart::Gate | ExpertPart::Up => vec![of_expert, hidden_size],
                ExpertPart::Down => vec![hidden_size, of_expert],
                ExpertPart::GateBias | ExpertPart::UpBias => vec![of_expert],
                ExpertPart::DownBias => vec![hidden_size],
            },
            Part::FfnGateBias | Part::FfnUpBias => vec![neurons],
            Part::EmbeddedGate => vec![self.embedded.unwrap_or(0), hidden_size],
            Part::EmbeddedOutput => vec![hidden_size, self.embedded.unwrap_or(0)],
            Part::BlockScale => vec![1],
            Part::AttnNorm
            | Part::AttnNormBias
            | Part::AttnOutputBias
            | Part::AttnPostNorm
            | Part::AttnPostNormBias
            | Part::FfnNorm
            | Part::FfnNormBias
            | Part::FfnDownBias
            | Part::FfnShare
            | Part::RouterNorm
            | Part::BesidePostNorm
            | Part::ExpertsNorm
            | Part::ExpertsPostNorm
            | Part::EmbeddedPostNorm
            | Part::FfnPostNorm
            | Part::FfnPostNormBias => vec![hidden_size],
            _ => panic!("{part:?} is not in this block"),
        }
    }
}
