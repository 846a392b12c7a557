//! Mixtures of experts: networks of which each token goes through a few.

use serde_json::Value;

use super::{Activation, BlockSpec, ExpertPart, Ffn, Part, Stored};
use crate::{
    ModelConfig, Result,
    config::{Keys, shortest},
};

/// `sum of w_e * expert_e(x)` over the experts that a router chooses for a token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Experts {
    /// How many there are.
    pub count: u16,
    /// How many a token goes through.
    pub used: u16,
    /// What each computes.
    pub ffn: Ffn,
    /// How they are chosen and weighted.
    pub routing: Routing,
    /// Whether what the network beside them gives is multiplied by `sigmoid(share . x)`.
    pub shares: bool,
    /// Whether they and their router read the residual stream through norms of their own, and norms
    /// stand behind their sum and behind the network beside them.
    pub has_norms: bool,
    /// Whether the file has gates and inputs of all experts of a block in one tensor.
    pub are_fused: bool,
    /// Whether it has them in MXFP4, which lies otherwise than plain values do.
    pub are_mxfp4: bool,
}

/// How a router chooses experts and weights what they give.
///
/// `s = scores(sharpness * router x + bias)`; chosen are those with the largest `s + correction`;
/// the weight of a chosen one is `scale * s`, or `scale * s / (sum of s over the chosen)`; in
/// experts with norms of their own, times a scale that each has.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Routing {
    /// What the router's products are multiplied by.
    pub sharpness: f32,
    /// What a score is made from.
    pub scores: Scores,
    /// Whether the router has a bias.
    pub has_bias: bool,
    /// Whether something is added to scores where experts are chosen.
    pub is_corrected: bool,
    /// Only experts of the best groups are chosen.
    pub groups: Option<ExpertGroups>,
    /// Whether the scores of the chosen are divided by their sum.
    pub normalizes: bool,
    /// What weights are multiplied by.
    pub scale: f32,
}

/// Experts in groups of one size, which follow each other; a group is as good as its best experts
/// together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertGroups {
    /// How many there are, a divisor of the number of experts.
    pub count: u16,
    /// From how many experts are chosen.
    pub used: u16,
    /// How many experts of a group tell how good it is.
    pub best: u16,
}

/// What a router's outputs become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scores {
    /// `softmax` over all experts.
    Softmax,
    /// `1 / (1 + e^-x)`.
    Sigmoid,
}

impl Routing {
    /// By a softmax over all experts, of which the chosen ones' share is taken.
    pub(super) const SOFTMAX: Self = Self {
        sharpness: 1.0,
        scores: Scores::Softmax,
        has_bias: false,
        is_corrected: false,
        groups: None,
        normalizes: true,
        scale: 1.0,
    };

    /// By a score of each expert by itself, with a correction.
    pub(super) const SIGMOID: Self =
        Self { scores: Scores::Sigmoid, is_corrected: true, ..Self::SOFTMAX };
}

impl Scores {
    /// GGUF's numbers, `expert_gating_func`.
    pub(crate) const fn gguf_number(self) -> u32 {
        match self {
            Self::Softmax => 1,
            Self::Sigmoid => 2,
        }
    }
}

/// Reads the experts of a model, if it has any: gated by SiLU, with weights as `routing` says, and
/// as wide as the network of a block without them if nothing is said.
pub(super) fn read(keys: &dyn Keys, config: &mut ModelConfig, routing: Routing) -> Result<()> {
    let mut count = None;
    for key in ["num_local_experts", "num_experts", "n_routed_experts"] {
        count = keys.count(key)?.or(count);
    }
    let used = keys.count("num_experts_per_tok")?;
    let width = keys.count("moe_intermediate_size")?.unwrap_or(config.ffn_size);
    let shared = shared_ffn_size(keys, width)?;
    let Some(count) = count.filter(|&count| count > 0) else { return Ok(()) };
    let (scores, is_softmax_of_chosen) = match (keys.count("expert_gating_func")?, keys.is_gguf()) {
        (Some(1), true) => (Scores::Softmax, false),
        (Some(2), true) => (Scores::Sigmoid, false),
        // A softmax over the chosen is what they have of one over all, over their sum.
        (Some(3), true) => (Scores::Softmax, true),
        (Some(other), true) => {
            return Err(keys.unsupported(format!("experts scored by `expert_gating_func` {other}")));
        }
        _ => (routing.scores, false),
    };
    let normalizes =
        keys.said("norm_topk_prob")?.unwrap_or(routing.normalizes) || is_softmax_of_chosen;
    let scale = keys.number("routed_scaling_factor")?.map_or(routing.scale, |scale| scale as f32);
    let groups = (keys.count("n_group")?, keys.count("topk_group")?);
    let groups = match groups {
        (Some(count), Some(used)) if count > 1 && used < count => {
            let best = keys.count("expert_group_best")?.unwrap_or(2);
            Some(ExpertGroups { count: small(count), used: small(used), best: small(best) })
        }
        _ => None,
    };
    let ffn = Ffn { width, activation: Activation::Silu, is_gated: true, has_bias: false };
    let experts = Experts {
        count: small(count),
        used: small(used.unwrap_or(0)),
        ffn,
        routing: Routing { scores, groups, normalizes, scale, ..routing },
        shares: false,
        has_norms: false,
        are_fused: false,
        are_mxfp4: false,
    };
    (config.features.experts, config.features.shared_ffn_size) = (Some(experts), shared);
    Ok(())
}

/// Neurons of the network beside experts of `width` neurons, if there is one: a number of them, or
/// what as many experts would have.
fn shared_ffn_size(keys: &dyn Keys, width: usize) -> Result<Option<usize>> {
    let mut size = None;
    for key in ["shared_expert_intermediate_size", "shared_intermediate_size"] {
        size = keys.count(key)?.filter(|&size| size > 0).or(size);
    }
    let experts = keys.count("n_shared_experts")?.filter(|&count| count > 0);
    Ok(size.or(experts.map(|count| width.saturating_mul(count))))
}

/// A number that the check of the configuration refuses if it does not fit.
pub(super) fn small(number: usize) -> u16 {
    number.try_into().unwrap_or(u16::MAX)
}

/// Reads which blocks have experts: all but the `dense` first, or as the file of this project says.
pub(super) fn read_blocks(
    keys: &dyn Keys,
    config: &mut ModelConfig,
    has_experts: impl Fn(usize) -> bool,
) -> Result<()> {
    let blocks = config.block_count;
    let said = keys.flags("expert_pattern", blocks)?;
    let sparse: Vec<bool> = said.unwrap_or_else(|| (0..blocks).map(has_experts).collect());
    config.features.sparse = if sparse.contains(&false) { sparse } else { Vec::new() };
    Ok(())
}

/// The keys of `config.json` that [`read`] and its like read back: how many experts there are is
/// under `count`, how wide they are under `width`, if they have a key of their own.
pub(super) fn write(config: &ModelConfig, json: &mut Value, count: &str, width: Option<&str>) {
    let Some(experts) = config.features.experts else { return };
    json[count] = experts.count.into();
    json["num_experts_per_tok"] = experts.used.into();
    if let Some(width) = width {
        json[width] = experts.ffn.width.into();
    }
}

/// The keys of `config.json` of families that choose among groups.
pub(super) fn write_groups(config: &ModelConfig, json: &mut Value) {
    let Some(experts) = config.features.experts else { return };
    let groups = experts.routing.groups.unwrap_or(ExpertGroups { count: 1, used: 1, best: 1 });
    json["n_group"] = groups.count.into();
    json["topk_group"] = groups.used.into();
    json["norm_topk_prob"] = experts.routing.normalizes.into();
    json["routed_scaling_factor"] = shortest(experts.routing.scale).into();
    let shared = config.features.shared_ffn_size.unwrap_or(0);
    json["n_shared_experts"] = (shared / experts.ffn.width).into();
    let dense = config.features.sparse.iter().take_while(|&&is_sparse| !is_sparse).count();
    json["first_k_dense_replace"] = dense.into();
}

/// Hugging Face's names of the network beside experts, of its gate, its inputs, and what leads
/// back: of families in which it counts as one expert,
pub(super) const BESIDE_ONE: [&str; 3] = [
    "mlp.shared_expert.gate_proj.weight",
    "mlp.shared_expert.up_proj.weight",
    "mlp.shared_expert.down_proj.weight",
];

/// and of those in which it counts as several.
pub(super) const BESIDE_MANY: [&str; 3] = [
    "mlp.shared_experts.gate_proj.weight",
    "mlp.shared_experts.up_proj.weight",
    "mlp.shared_experts.down_proj.weight",
];

/// llama.cpp's names of the network beside experts: of its gate, its inputs, and what leads back.
const BESIDE_IN_GGUF: [&str; 3] =
    ["ffn_gate_shexp.weight", "ffn_up_shexp.weight", "ffn_down_shexp.weight"];

/// How files store the network beside experts: under `names` of its own, of its gate, its inputs,
/// and what leads back. `None` for other parts, and in a block without experts.
pub(super) fn beside(
    part: Part,
    spec: Option<&BlockSpec>,
    [gate, up, down]: [&'static str; 3],
) -> Option<Stored> {
    spec?.experts?;
    match part {
        Part::FfnGate => Some(Stored::named(gate)),
        Part::FfnUp => Some(Stored::named(up)),
        Part::FfnDown => Some(Stored::named(down)),
        _ => None,
    }
}

/// How llama.cpp's files store a part of a mixture of experts: those of all experts in one tensor,
/// the network beside them under names of its own. `None` for other parts.
pub(super) fn in_gguf(part: Part, spec: Option<&BlockSpec>) -> Option<Stored> {
    let experts = spec?.experts?;
    Some(match part {
        Part::FfnGate | Part::FfnUp | Part::FfnDown => return beside(part, spec, BESIDE_IN_GGUF),
        Part::Expert(_, ExpertPart::Gate | ExpertPart::Up) if experts.are_fused => {
            Stored::of_experts("ffn_gate_up_exps.weight", &[ExpertPart::Gate, ExpertPart::Up])
        }
        Part::Expert(_, part) => match part {
            ExpertPart::Gate => Stored::of_experts("ffn_gate_exps.weight", &[ExpertPart::Gate]),
            ExpertPart::GateBias => {
                Stored::of_experts("ffn_gate_exps.bias", &[ExpertPart::GateBias])
            }
            ExpertPart::Up => Stored::of_experts("ffn_up_exps.weight", &[ExpertPart::Up]),
            ExpertPart::UpBias => Stored::of_experts("ffn_up_exps.bias", &[ExpertPart::UpBias]),
            ExpertPart::Down => Stored::of_experts("ffn_down_exps.weight", &[ExpertPart::Down]),
            ExpertPart::DownBias => {
                Stored::of_experts("ffn_down_exps.bias", &[ExpertPart::DownBias])
            }
        },
        _ => return None,
    })
}

/// How Hugging Face's files store experts that are fused; `None` for other parts.
pub(super) fn in_hf(part: Part, spec: Option<&BlockSpec>) -> Option<Stored> {
    let is_fused = spec?.experts?.are_fused;
    let gate_up = &[ExpertPart::Gate, ExpertPart::Up];
    match part {
        Part::Expert(_, ExpertPart::Gate | ExpertPart::Up) if is_fused => {
            Some(Stored::of_experts("mlp.experts.gate_up_proj", gate_up))
        }
        Part::Expert(_, ExpertPart::Down) if is_fused => {
            Some(Stored::of_experts("mlp.experts.down_proj", &[ExpertPart::Down]))
        }
        _ => None,
    }
}
