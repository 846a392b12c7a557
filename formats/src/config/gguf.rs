//! Hyperparameters as GGUF metadata.

use std::{cell::RefCell, collections::HashSet, path::Path};

use super::{
    Features, GlobalHeads, Keys, LongRope, ModelConfig, Rope, Scaling, Yarn,
    keys::{every, gguf_name},
    rope::yarn_amplitude,
    rope_pairs,
    unread::{is_about, is_harmless_in_gguf},
};
use crate::{
    FormatError, Generation, Result,
    arch::{
        self, Activation, Convolution, ExpertGroups, Experts, Family, Mixer, Norm, Part, Scores,
    },
    gguf::{Array, Metadata, Value},
    special_tokens::{END_IDS_KEY, GGML_END_KEYS, SpecialTokens},
};

const DEFAULT_ROPE_THETA: f64 = 10000.0;

/// What the tensors of a GGUF file say about the configuration.
#[derive(Debug, Default)]
pub struct TensorFacts {
    /// Rows of the embedding, where it is a tensor of its own.
    pub embedding_rows: Option<usize>,
    /// The tensor `rope_freqs.weight`.
    pub factors: Option<Vec<f32>>,
    /// The tensor `rope_factors_short.weight`.
    pub short: Option<Vec<f32>>,
    /// The tensor `rope_factors_long.weight`.
    pub long: Option<Vec<f32>>,
}

impl ModelConfig {
    /// Reads the standard keys of an architecture.
    ///
    /// Only the tensors tell whether the embeddings are tied and which layers have biases, so
    /// `tied_embeddings` is false here and the caller's to set, as is what
    /// [`find_biases`](Self::find_biases) sets.
    ///
    /// # Errors
    /// `Malformed` if a key is missing, has a value of the wrong kind, or contradicts its other
    /// spelling; `Unsupported` for another architecture, for what this program does not compute,
    /// and for a key of the architecture or of RoPE that nothing here reads.
    pub fn from_gguf(path: &Path, metadata: &Metadata, facts: TensorFacts) -> Result<Self> {
        let general = Metadata::str(metadata, "general.architecture");
        let architecture = general.unwrap_or_default();
        let keys = GgufKeys { path, metadata, architecture, asked: RefCell::default() };
        let architecture = keys.require("general.architecture", "a string", Value::as_str)?;
        let Some(family) = arch::by_architecture(architecture) else {
            return keys.unsupported(format!("architecture `{architecture}`"));
        };
        let hidden_size = keys.size("embedding_length")?;
        let head_count = keys.size("attention.head_count")?;
        let key_length = keys.optional_size("attention.key_length")?;
        let of_heads = match family.has_latent_attention() {
            true => Some(keys.size("rope.dimension_count")?),
            false => key_length,
        };
        let global_head_dim = match of_heads {
            Some(head_dim) => head_dim,
            None => hidden_size.checked_div(head_count).unwrap_or(0),
        };
        let rotated = keys.rotated(family, "", global_head_dim)?;
        let has_global_heads = family.has_global_heads();
        let (head_dim, local_rotated) = match has_global_heads {
            true => {
                let of_windowed = keys.optional_size("attention.key_length_swa")?;
                let head_dim = of_windowed.unwrap_or(global_head_dim);
                (head_dim, keys.rotated(family, "_swa", head_dim)?)
            }
            false => (global_head_dim, rotated),
        };
        let kv_head_count = match has_global_heads {
            true => keys.kv_heads_of(true)?.or(keys.kv_heads_of(false)?),
            false => keys.kv_heads()?,
        };
        let kv_head_count = kv_head_count.unwrap_or(head_count);
        // llama.cpp counts them among the blocks.
        let guessing_blocks = keys.optional_size("nextn_predict_layers")?.unwrap_or(0);
        let vocab_size = read_vocab_size(&keys, facts.embedding_rows)?;
        let context_length = keys.size("context_length")?;
        let (rope, local_rope) = Ropes {
            keys: &keys,
            family,
            pairs: rope_pairs(rotated),
            local_pairs: rope_pairs(local_rotated),
            context_length,
        }
        .read(facts)?;
        let epsilon = match family.norm() {
            Norm::Rms => "attention.layer_norm_rms_epsilon",
            Norm::Layer => "attention.layer_norm_epsilon",
        };
        let mut config = Self {
            family,
            name: keys.optional("general.name", "a string", Value::as_str)?.map(str::to_owned),
            block_count: keys.size("block_count")?.saturating_sub(guessing_blocks),
            hidden_size,
            ffn_size: match has_global_heads {
                true => keys.first_size("feed_forward_length")?,
                false => keys.size("feed_forward_length")?,
            },
            head_count,
            kv_head_count,
            head_dim,
            vocab_size,
            context_length,
            norm_epsilon: keys.require(&keys.own(epsilon), "a float", Value::as_f64)? as f32,
            rope,
            sliding_window: None,
            features: Features {
                local_rope,
                guessing_blocks,
                global_heads: has_global_heads.then_some(GlobalHeads {
                    head_dim: global_head_dim,
                    kv_heads: kv_head_count,
                    values_are_keys: false,
                }),
                ..Features::default()
            },
            tied_embeddings: false,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
            add_bos: false,
            generation: Generation::from_gguf(path, metadata)?,
        };
        // What a family reads is as long as the model has blocks.
        config = config.validated(path)?;
        family.read(&keys, &mut config)?;
        keys.refuse_blocks_without_heads(&config)?;
        SpecialTokens::from_gguf(path, metadata, vocab_size)?.describe(&mut config);
        let config = config.validated(path)?;
        keys.refuse_unread(&config)?;
        Ok(config)
    }

    /// Finds by their presence the biases and norms that GGUF does not mention; `has_tensor` tells
    /// of a tensor.
    pub fn find_biases(&mut self, has_tensor: impl Fn(&str) -> bool) {
        let has = |layer: &str| has_tensor(&format!("blk.0.{layer}.bias"));
        self.features.has_attention_bias |= has("attn_q") || has("attn_qkv");
        self.features.has_output_bias |= has("attn_output");
        self.features.has_ffn_bias |= has("ffn_down");
        if self.family.default("use_qk_norm").is_some() {
            self.features.has_qk_norm |= has_tensor("blk.0.attn_q_norm.weight");
        }
    }

    /// Finds out whether values are made of keys in blocks without a window; `has` tells of a
    /// tensor.
    pub(crate) fn find_keys_as_values(&mut self, has: impl Fn(&str) -> bool) {
        let global = (0..self.block_count).find(|&index| !self.is_windowed(index));
        if let (Some(index), Some(heads)) = (global, &mut self.features.global_heads) {
            heads.values_are_keys = !has(&format!("blk.{index}.attn_v.weight"));
        }
    }

    /// Finds out how many tokens say something to blocks by themselves; `rows` tells those of a
    /// tensor.
    pub(crate) fn find_block_embedding(&mut self, rows: impl Fn(&str) -> Option<usize>) {
        if let (Some(embedding), Some(rows)) =
            (&mut self.features.block_embedding, rows(&Part::BlockEmbedding.gguf_name()))
        {
            embedding.rows = rows;
        }
    }

    /// Finds out how experts are scored, of a file that does not say it: one by one if something is
    /// added to scores. Without, whether experts are chosen by groups is not said, either: they are
    /// not. `has` tells of a tensor; gives a sentence if groups are left out.
    pub(crate) fn find_corrections(
        &mut self,
        path: &Path,
        has: impl Fn(&str) -> bool,
    ) -> Option<String> {
        let is_corrected =
            (0..self.block_count).any(|block| has(&format!("blk.{block}.exp_probs_b.bias")));
        let routing = &mut self.features.experts.as_mut()?.routing;
        if is_corrected {
            (routing.scores, routing.is_corrected) = (Scores::Sigmoid, true);
        }
        let groups = routing.groups.filter(|_| routing.scores == Scores::Softmax)?;
        routing.groups = None;
        Some(format!(
            "`{}`: experts are in {} groups, but whether they are chosen by group is not said: they \
             are not",
            path.display(),
            groups.count
        ))
    }

    /// Finds out whether gates and inputs of experts are one tensor, as of some converters; `has`
    /// tells of a tensor.
    pub(crate) fn find_fused_experts(&mut self, has: impl Fn(&str) -> bool) {
        let is_fused = |block| has(&format!("blk.{block}.ffn_gate_up_exps.weight"));
        if let Some(experts) = &mut self.features.experts {
            experts.are_fused = (0..self.block_count).any(is_fused);
        }
    }

    /// The standard keys that [`from_gguf`](Self::from_gguf) reads back.
    ///
    /// Not among them: what GGUF keeps in tensors, which [`rope_vectors`](Self::rope_vectors)
    /// gives, and `tied_embeddings`, which is the absence of `output.weight`.
    pub fn to_gguf(&self) -> Metadata {
        let own = |key: &str| format!("{}.{key}", self.family.architecture());
        // Every size was validated to be far below 2^32.
        let size = |size: usize| Value::U32(size as u32);
        let mut entries =
            vec![("general.architecture".to_owned(), self.family.architecture().into())];
        entries.extend(
            self.name.as_ref().map(|name| ("general.name".to_owned(), name.as_str().into())),
        );
        let epsilon = match self.family.norm() {
            Norm::Rms => "attention.layer_norm_rms_epsilon",
            Norm::Layer => "attention.layer_norm_epsilon",
        };
        entries.extend([
            (own("vocab_size"), size(self.vocab_size)),
            (own("context_length"), size(self.context_length)),
            (own("embedding_length"), size(self.hidden_size)),
            (own("block_count"), size(self.block_count)),
            (own("feed_forward_length"), self.ffn_entry()),
            (own("attention.head_count"), size(self.head_count)),
            (own("attention.head_count_kv"), self.kv_heads_entry()),
            (own(epsilon), self.norm_epsilon.into()),
            (own("rope.dimension_count"), size(2 * self.rope.factors.len())),
            (own("rope.freq_base"), self.rope.theta.into()),
        ]);
        entries.extend(self.head_entries().into_iter().map(|(key, value)| (own(key), value)));
        entries.extend(
            self.sliding_window.map(|window| (own("attention.sliding_window"), size(window))),
        );
        entries.extend(self.scaling_entries().into_iter().map(|(key, value)| (own(key), value)));
        entries.extend(self.feature_entries().into_iter().map(|(key, value)| (own(key), value)));
        let bos = self.bos_token_id.map(|id| ("tokenizer.ggml.bos_token_id".to_owned(), id.into()));
        let eos = self.eos_token_ids.first().map(|&id| (GGML_END_KEYS[0].to_owned(), id.into()));
        let all_eos = (self.eos_token_ids.len() > 1)
            .then(|| (END_IDS_KEY.to_owned(), self.eos_token_ids.clone().into()));
        // Of several ends llama.cpp's readers know two: of a text and of a turn.
        let eot = self.eos_token_ids.get(1).map(|&id| (GGML_END_KEYS[1].to_owned(), id.into()));
        entries.extend(bos.into_iter().chain(eos).chain(eot).chain(all_eos));
        entries.push(("tokenizer.ggml.add_bos_token".to_owned(), self.add_bos.into()));
        entries.extend(self.generation.to_gguf());
        Metadata::from_unique(entries)
    }
}

/// The factor of RoPE scaling: its name, and the one of files before autumn 2023.
const ROPE_FACTOR_KEYS: [&str; 2] = ["rope.scaling.factor", "rope.scale_linear"];

impl ModelConfig {
    /// What GGUF keeps in tensors: names and values.
    pub fn rope_vectors(&self) -> Vec<(&'static str, &[f32])> {
        let factors = self.rope.factors.as_slice();
        match &self.rope.scaling {
            Scaling::Factors if self.rope.linear_factor().is_some() => Vec::new(),
            Scaling::Factors => vec![(arch::ROPE_FACTORS, factors)],
            Scaling::Long(long) => {
                vec![(arch::ROPE_FACTORS_LONG, &long.factors), (arch::ROPE_FACTORS_SHORT, factors)]
            }
            // The keys say all.
            Scaling::Yarn(_) | Scaling::Dynamic { .. } => Vec::new(),
        }
    }

    /// The keys of RoPE scaling, without the architecture.
    fn scaling_entries(&self) -> Vec<(&'static str, Value)> {
        let Rope { theta, amplitude, scaling, .. } = &self.rope;
        let context = |context: usize| ("rope.scaling.original_context_length", context);
        let size = |(key, size): (&'static str, usize)| (key, Value::U32(size as u32));
        let mut entries = match scaling {
            Scaling::Factors => match self.rope.linear_factor() {
                None | Some(1.0) => Vec::new(),
                Some(factor) => vec![
                    ("rope.scaling.type", "linear".into()),
                    ("rope.scaling.factor", factor.into()),
                ],
            },
            Scaling::Yarn(yarn) => vec![
                ("rope.scaling.type", "yarn".into()),
                ("rope.scaling.factor", (yarn.factor as f32).into()),
                size(context(yarn.context)),
                ("rope.scaling.yarn_beta_fast", (yarn.beta_fast as f32).into()),
                ("rope.scaling.yarn_beta_slow", (yarn.beta_slow as f32).into()),
                ("rope.scaling.yarn_attn_factor", (*amplitude).into()),
                // llama.cpp multiplies its own amplitude by it.
                (
                    "rope.scaling.attn_factor",
                    (amplitude / yarn_amplitude(yarn.factor, 1.0) as f32).into(),
                ),
                ("rope.scaling.yarn_truncate", yarn.truncate.into()),
            ],
            Scaling::Long(long) => vec![
                ("rope.scaling.type", "longrope".into()),
                size(context(long.context)),
                ("rope.scaling.attn_factor", (*amplitude).into()),
            ],
            Scaling::Dynamic { factor, context: made_for } => vec![
                ("rope.scaling.type", "dynamic".into()),
                ("rope.scaling.factor", (*factor).into()),
                size(context(*made_for)),
            ],
        };
        let local = self.features.local_rope.as_ref().map(|local| local.theta);
        let local = local.or(self.family.has_local_rope().then_some(*theta));
        entries.extend(local.map(|theta| ("rope.freq_base_swa", theta.into())));
        entries
    }

    /// The keys of what Llama has not, without the architecture; all that are as in Llama left out.
    fn feature_entries(&self) -> Vec<(&'static str, Value)> {
        let features = &self.features;
        let scale = |key, scale: f32| (scale != 1.0).then(|| (key, scale.into()));
        let number = |key, number: Option<f32>| number.map(|number| (key, number.into()));
        let size = |key, size: Option<usize>| size.map(|size| (key, Value::U32(size as u32)));
        let flags = |key, flags: &[bool]| {
            (!flags.is_empty()).then(|| (key, Value::Array(Array::Bool(flags.to_vec()))))
        };
        // GGUF's is what logits are divided by. llama.cpp requires it of families that have it.
        let logit_divisor = 1.0 / features.logit_scale;
        let has_divisor = logit_divisor != 1.0 || self.family.default("logits_scaling").is_some();
        let query_scale = features.query_scaling.map(|scaling| scaling.beta);
        [
            scale("embedding_scale", features.embedding_scale),
            scale("residual_scale", features.residual_scale),
            has_divisor.then(|| ("logit_scale", logit_divisor.into())),
            number("final_logit_softcapping", features.logit_softcap),
            number("attention.scale", features.attention_scale),
            number("attn_logit_softcapping", features.attention_softcap),
            number("attention.temperature_scale", query_scale),
            features.norms_sums.then_some(("norm_before", false.into())),
            size("token_embedding_length", features.embedding_size),
            size(
                "embedding_length_per_layer_input",
                features.block_embedding.map(|embedding| embedding.width),
            ),
            size(
                "vocab_size_per_layer_input",
                features.block_embedding.map(|embedding| embedding.rows),
            ),
            size(
                "attention.shared_kv_layers",
                Some(features.sharing_blocks).filter(|&blocks| blocks > 0),
            ),
            flags("attention.sliding_window_pattern", &features.windowed),
            flags("rope.pattern", &features.rotated),
        ]
        .into_iter()
        .flatten()
        .chain(self.expert_entries())
        .chain(self.recurrence_entries())
        .collect()
    }

    /// The keys of the sizes of heads, without the architecture. Of latent attention the first two
    /// are what llama.cpp keeps of a token.
    fn head_entries(&self) -> Vec<(&'static str, Value)> {
        let size = |key, size: usize| (key, Value::U32(size as u32));
        let [key_length, value_length] = ["attention.key_length", "attention.value_length"];
        if let Some(GlobalHeads { head_dim, .. }) = self.features.global_heads {
            let local = &self.features.local_rope.as_ref().unwrap_or(&self.rope).factors;
            return vec![
                size(key_length, head_dim),
                size(value_length, head_dim),
                size("attention.key_length_swa", self.head_dim),
                size("attention.value_length_swa", self.head_dim),
                size("rope.dimension_count_swa", 2 * local.len()),
            ];
        }
        let Some(latent) = self.features.latent else {
            return vec![size(key_length, self.head_dim), size(value_length, self.head_dim)];
        };
        let mut entries = vec![
            size(key_length, latent.kept_dim()),
            size(value_length, latent.rank),
            size("attention.key_length_mla", latent.query_dim()),
            size("attention.value_length_mla", latent.value_dim),
            size("attention.kv_lora_rank", latent.rank),
            ("attention.scale", latent.scale.into()),
        ];
        entries.extend(latent.query_rank.map(|rank| size("attention.q_lora_rank", rank)));
        entries
    }

    /// Neurons: one number, or one for each block if they differ.
    fn ffn_entry(&self) -> Value {
        let features = &self.features;
        if !(features.sharing_are_wide && features.sharing_blocks > 0) {
            return Value::U32(self.ffn_size as u32);
        }
        let width = |index: usize| match features.shares(index, self.block_count) {
            true => 2 * self.ffn_size as u32,
            false => self.ffn_size as u32,
        };
        Value::Array(Array::U32((0..self.block_count).map(width).collect()))
    }

    /// The heads of keys and values: of blocks with another mixer than attention llama.cpp tells
    /// short convolutions by none.
    fn kv_heads_entry(&self) -> Value {
        if let Some(global) = self.features.global_heads {
            let heads = (0..self.block_count).map(|index| match self.is_windowed(index) {
                true => self.kv_head_count as u32,
                false => global.kv_heads as u32,
            });
            return Value::Array(Array::U32(heads.collect()));
        }
        let heads = |is_recurrent| if is_recurrent { 0 } else { self.kv_head_count as u32 };
        match self.features.recurrence {
            Some(Mixer::Convolution(_)) => {
                let recurrent = self.features.recurrent.iter();
                Value::Array(Array::U32(
                    recurrent.map(|&is_recurrent| heads(is_recurrent)).collect(),
                ))
            }
            _ if self.features.latent.is_some() => Value::U32(1),
            _ => Value::U32(heads(false)),
        }
    }

    /// The keys of blocks with a state, without the architecture.
    fn recurrence_entries(&self) -> Vec<(&'static str, Value)> {
        let size = |key, size: usize| (key, Value::U32(size as u32));
        match self.features.recurrence {
            None | Some(Mixer::Attention(_) | Mixer::Latent(_)) => Vec::new(),
            Some(Mixer::Convolution(Convolution { taps })) => {
                vec![size("shortconv.l_cache", taps)]
            }
            Some(Mixer::DeltaNet(net)) => vec![
                size("ssm.group_count", net.key_heads),
                size("ssm.time_step_rank", net.value_heads),
                size("ssm.state_size", net.key_dim),
                size("ssm.inner_size", net.values()),
                size("ssm.conv_kernel", net.taps),
                ("ssm.tiled_value_heads", net.is_tiled.into()),
                (
                    "attention.recurrent_layers",
                    Value::Array(Array::Bool(self.features.recurrent.clone())),
                ),
            ],
        }
    }

    /// The keys of experts, without the architecture.
    fn expert_entries(&self) -> Vec<(&'static str, Value)> {
        let features = &self.features;
        let Some(Experts { count, used, ffn, routing, .. }) = features.experts else {
            return Vec::new();
        };
        let size = |key, size: usize| (key, Value::U32(size as u32));
        let mut entries = vec![
            size("expert_count", count.into()),
            size("expert_used_count", used.into()),
            size("expert_feed_forward_length", ffn.width),
            ("expert_gating_func", routing.scores.gguf_number().into()),
            ("expert_weights_norm", routing.normalizes.into()),
            ("expert_weights_scale", routing.scale.into()),
        ];
        if let Activation::ClampedSwish { alpha, limit } = ffn.activation {
            entries.extend([("swiglu_alpha", alpha.into()), ("swiglu_limit", limit.into())]);
        }
        if let Some(ExpertGroups { count, used, best }) = routing.groups {
            entries.push(size("expert_group_best", best.into()));
            entries.push(size("expert_group_count", count.into()));
            entries.push(size("expert_group_used_count", used.into()));
        }
        if let Some(shared) = features.shared_ffn_size {
            entries.push(size("expert_shared_feed_forward_length", shared));
            if shared.is_multiple_of(ffn.width) {
                entries.push(size("expert_shared_count", shared / ffn.width));
            }
        }
        let dense = features.sparse.iter().take_while(|&&is_sparse| !is_sparse).count();
        if dense > 0 {
            entries.push(size("leading_dense_block_count", dense));
        }
        if features.sparse.iter().skip(dense).any(|&is_sparse| !is_sparse) {
            let pattern = Array::Bool(features.sparse.clone());
            entries.push(("expert_pattern", Value::Array(pattern)));
        }
        entries
    }
}

/// The key, or else the rows of the embedding, which may be more or fewer than the tokens, or else
/// the number of tokens.
fn read_vocab_size(keys: &GgufKeys<'_>, embedding_rows: Option<usize>) -> Result<usize> {
    match keys.metadata.strings("tokenizer.ggml.tokens") {
        Some(tokens) => {
            let stated = keys.optional_size("vocab_size")?;
            Ok(stated.or(embedding_rows).unwrap_or(tokens.len()))
        }
        None => keys.size("vocab_size"),
    }
}

/// Reads rotary embeddings.
struct Ropes<'k, 'a> {
    keys: &'k GgufKeys<'a>,
    family: &'static dyn Family,
    /// Turned pairs of channels of blocks that see all tokens.
    pairs: usize,
    /// Those of blocks with a window.
    local_pairs: usize,
    context_length: usize,
}

impl Ropes<'_, '_> {
    /// That of blocks that see all tokens, and that of blocks with a window, if it is another.
    fn read(&self, facts: TensorFacts) -> Result<(Rope, Option<Rope>)> {
        let keys = self.keys;
        let theta = keys.float("rope.freq_base")?.unwrap_or(DEFAULT_ROPE_THETA);
        let global = self.global(theta, facts)?;
        if !self.family.has_local_rope() {
            return Ok((global, None));
        }
        let local_theta = keys.float("rope.freq_base_swa")?;
        // Files before that key: llama.cpp has the base in the code.
        let local_theta = local_theta.or_else(|| self.family.default("rope_local_base_freq"));
        let local = Rope::new(local_theta.unwrap_or(theta) as f32, vec![1.0; self.local_pairs]);
        let local = Some(local).filter(|local| *local != global);
        Ok((global, local))
    }

    fn global(&self, theta: f64, facts: TensorFacts) -> Result<Rope> {
        let keys = self.keys;
        let factor = self.read_factor()?;
        let need_factor = || {
            let key = keys.own(ROPE_FACTOR_KEYS[0]);
            factor.ok_or_else(|| keys.malformed(&key, "none", "a float"))
        };
        let amplitude = keys.float("rope.scaling.attn_factor")?.filter(|&factor| factor != 0.0);
        let context = keys.optional_size("rope.scaling.original_context_length")?;
        let context = context.unwrap_or(self.context_length);
        let kind = keys.own("rope.scaling.type");
        let kind = keys.optional(&kind, "a string", Value::as_str)?;
        let (theta, is_one) = (theta as f32, amplitude.is_none_or(|found| is_about(found, 1.0)));
        if let (Some(short), Some(long)) = (facts.short, facts.long) {
            for (name, factors) in
                [(arch::ROPE_FACTORS_SHORT, &short), (arch::ROPE_FACTORS_LONG, &long)]
            {
                if factors.len() != self.pairs {
                    let place = format!("tensor `{name}`");
                    let expected = format!("{}, one per turned pair", self.pairs);
                    let found = format!("{} factors", factors.len());
                    return Err(FormatError::malformed(keys.path, place, "", found, expected));
                }
            }
            let scaling = Scaling::Long(LongRope { factors: long, context });
            let amplitude = amplitude.unwrap_or(1.0) as f32;
            return Ok(Rope { theta, factors: short, amplitude, scaling });
        }
        let scale = match kind {
            Some("none") => 1.0,
            // A factor without a type is linear, as llama.cpp has it.
            None => factor.unwrap_or(1.0) as f32,
            Some("linear") => need_factor()? as f32,
            Some("yarn") => {
                let factor = need_factor()?;
                return self.yarn(theta, factor, context, amplitude.unwrap_or(1.0));
            }
            Some("dynamic") => {
                let scaling = Scaling::Dynamic { factor: need_factor()? as f32, context };
                return Ok(Rope { scaling, ..Rope::new(theta, vec![1.0; self.pairs]) });
            }
            Some(other) => return keys.unsupported(format!("RoPE scaling `{other}`")),
        };
        if !is_one {
            let key = keys.own("rope.scaling.attn_factor");
            return keys.unsupported(format!("key `{key}` of {}", amplitude.unwrap_or_default()));
        }
        let factors = facts.factors.unwrap_or_else(|| vec![1.0; self.pairs]);
        Ok(Rope::new(theta, factors.into_iter().map(|factor| factor * scale).collect()))
    }

    /// llama.cpp's amplitude is `0.1 ln(factor) + 1`; with a `log multiplier` the quotient of two,
    /// which is 1 for the only value that converters write; times `more`. What the model itself
    /// says goes before.
    fn yarn(&self, theta: f32, factor: f64, context: usize, more: f64) -> Result<Rope> {
        let keys = self.keys;
        let truncate = keys.own("rope.scaling.yarn_truncate");
        let truncate = keys.optional(&truncate, "true or false", Value::as_bool)?;
        let yarn = Yarn {
            factor,
            context,
            beta_fast: keys.float("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
            beta_slow: keys.float("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
            truncate: truncate.unwrap_or_else(|| self.family.default("truncate") != Some(0.0)),
        };
        let log_multiplier = keys.float("rope.scaling.yarn_log_multiplier")?.unwrap_or(0.0);
        let own = keys.float("rope.scaling.yarn_attn_factor")?.filter(|&factor| factor != 0.0);
        let amplitude = match own {
            Some(amplitude) => amplitude,
            None if log_multiplier != 0.0 => more,
            None => more * yarn_amplitude(factor, 1.0),
        };
        Ok(Rope::yarn(theta, self.pairs, yarn, amplitude as f32))
    }

    /// The factor under its name or its old one; llama.cpp takes 0 for none.
    fn read_factor(&self) -> Result<Option<f64>> {
        let keys = self.keys;
        let mut found = None;
        for key in ROPE_FACTOR_KEYS {
            let factor = keys.float(key)?.filter(|&factor| factor != 0.0);
            match (found, factor) {
                (Some(first), Some(factor)) if !is_about(factor, first) => {
                    let expected = format!("{first} as in `{}`", keys.own(ROPE_FACTOR_KEYS[0]));
                    return Err(keys.malformed(&keys.own(key), factor, &expected));
                }
                _ => found = found.or(factor),
            }
        }
        Ok(found)
    }
}

/// Metadata, the file that it comes from, and which of its keys were asked for.
struct GgufKeys<'a> {
    path: &'a Path,
    metadata: &'a Metadata,
    architecture: &'a str,
    asked: RefCell<HashSet<String>>,
}

impl<'a> GgufKeys<'a> {
    /// A key of the architecture.
    fn own(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    /// Refuses keys that no rule read and that could change the computation.
    fn refuse_unread(&self, config: &ModelConfig) -> Result<()> {
        let asked = self.asked.borrow();
        let unread = self
            .metadata
            .iter()
            .find(|&(key, value)| !asked.contains(key) && !is_harmless_in_gguf(key, value, config));
        match unread {
            Some((key, value)) => self.unsupported(format!("key `{key}` of {value}")),
            None => Ok(()),
        }
    }

    fn unsupported<T>(&self, what: String) -> Result<T> {
        Err(FormatError::unsupported(self.path, what, ""))
    }

    fn malformed(&self, key: &str, found: impl ToString, expected: &str) -> FormatError {
        FormatError::malformed(self.path, format!("key `{key}`"), "", found, expected)
    }

    /// The value that `read` accepts as `kind`, `None` if the key is absent.
    fn optional<T>(
        &self,
        key: &str,
        kind: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        self.asked.borrow_mut().insert(key.to_owned());
        let value = self.metadata.get(key);
        value.map(|value| read(value).ok_or_else(|| self.malformed(key, value, kind))).transpose()
    }

    fn require<T>(
        &self,
        key: &str,
        kind: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<T> {
        self.optional(key, kind, read)?.ok_or_else(|| self.malformed(key, "none", kind))
    }

    /// A float of the architecture.
    fn float(&self, key: &str) -> Result<Option<f64>> {
        self.optional(&self.own(key), "a float", Value::as_f64)
    }

    /// A whole number of the architecture.
    fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        self.optional(&self.own(key), "a whole number, the same for all blocks", as_size)
    }

    /// A number, or the first of several that blocks have.
    fn first_size(&self, key: &str) -> Result<usize> {
        let key = self.own(key);
        self.require(&key, "a whole number, or one for each block", |value| {
            match value.as_array() {
                None => as_size(value),
                Some(array) => array.to_u64s()?.first().copied()?.try_into().ok(),
            }
        })
    }

    /// Turned channels of heads of `head_dim`, by the key with this ending, once that and the size
    /// of values fit.
    fn rotated(&self, family: &dyn Family, ending: &str, head_dim: usize) -> Result<usize> {
        let turns_partly = family.default("partial_rotary_factor").is_some();
        let [values, rotated] = [
            ("attention.value_length", family.has_latent_attention()),
            ("rope.dimension_count", turns_partly),
        ]
        .map(|(key, may_differ)| -> Result<usize> {
            let key = format!("{key}{ending}");
            let found = self.optional_size(&key)?.unwrap_or(head_dim);
            match found == head_dim || may_differ {
                true => Ok(found),
                false => {
                    let key = self.own(&key);
                    self.unsupported(format!("`{key}` {found} beside a head size of {head_dim}"))
                }
            }
        });
        values.and(rotated)
    }

    /// The heads of keys and values of blocks with a window, or of those without.
    fn kv_heads_of(&self, windowed: bool) -> Result<Option<usize>> {
        let key = self.own(KV_HEADS);
        let Some(heads) = self.metadata.get(&key).and_then(kv_heads_of_blocks) else {
            return self.optional_size(KV_HEADS);
        };
        let kinds = self.windowed(heads.len())?.unwrap_or_else(|| vec![false; heads.len()]);
        let alike = heads.iter().zip(kinds).filter(|&(_, found)| found == windowed);
        let alike: Vec<u64> = alike.map(|(&heads, _)| heads).collect();
        let kind = "the same number for all blocks with a window, and for all without";
        self.optional(&key, kind, |_| match alike.is_empty() {
            true => Some(None),
            false => Some(Some(all_equal(&Array::U64(alike.clone()))?.try_into().ok()?)),
        })
        .map(Option::flatten)
    }

    /// The heads of keys and values of blocks that have some.
    fn kv_heads(&self) -> Result<Option<usize>> {
        let kind = "a whole number, the same for all blocks, or 0";
        self.optional(&self.own(KV_HEADS), kind, |value| match kv_heads_of_blocks(value) {
            None => as_size(value),
            Some(mut heads) => {
                heads.retain(|&heads| heads > 0);
                all_equal(&Array::U64(heads))?.try_into().ok()
            }
        })
    }

    /// Refuses keys and values of no heads in blocks that need some.
    fn refuse_blocks_without_heads(&self, config: &ModelConfig) -> Result<()> {
        let heads = self.metadata.get(&self.own(KV_HEADS)).and_then(kv_heads_of_blocks);
        let has_none =
            |&(index, &heads): &(usize, &u64)| heads == 0 && !config.features.is_recurrent(index);
        match heads.iter().flatten().enumerate().find(has_none) {
            Some((index, _)) => {
                self.unsupported(format!("block {index} without heads of keys and values"))
            }
            None => Ok(()),
        }
    }

    fn size(&self, key: &str) -> Result<usize> {
        let found = self.optional_size(key)?;
        found.ok_or_else(|| self.malformed(&self.own(key), "none", "a whole number"))
    }
}

impl Keys for GgufKeys<'_> {
    fn model_type(&self) -> Option<&str> {
        None
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        match gguf_name(key) {
            // llama.cpp takes 0 for none.
            Some(key) => Ok(self.float(key)?.filter(|&number| number != 0.0)),
            None => Ok(None),
        }
    }

    fn count(&self, key: &str) -> Result<Option<usize>> {
        match gguf_name(key) {
            Some(key) => Ok(self.optional_size(key)?.filter(|&count| count > 0)),
            None => Ok(None),
        }
    }

    fn flag(&self, key: &str) -> Result<bool> {
        let found = self.said(key)?;
        let family = arch::by_architecture(self.architecture);
        let is_known = gguf_name(key).is_some();
        let default = || is_known && family.and_then(|family| family.default(key)) == Some(1.0);
        Ok(found.unwrap_or_else(default))
    }

    fn unsupported(&self, what: String) -> FormatError {
        FormatError::unsupported(self.path, what, "")
    }

    fn said(&self, key: &str) -> Result<Option<bool>> {
        match gguf_name(key) {
            Some(name) => self.optional(&self.own(name), "true or false", Value::as_bool),
            None => Ok(None),
        }
    }

    fn sparse(&self, _blocks: usize) -> Result<Option<Vec<bool>>> {
        Ok(None)
    }

    fn is_text(&self, _key: &str, _text: &str) -> Result<bool> {
        Ok(false)
    }

    fn numbers(&self, key: &str) -> Result<Vec<usize>> {
        let Some(key) = gguf_name(key) else { return Ok(Vec::new()) };
        let list = self.optional(&self.own(key), "whole numbers", |value| {
            let Some(array) = value.as_array() else { return Some(Vec::new()) };
            array.to_u64s()?.into_iter().map(|number| number.try_into().ok()).collect()
        })?;
        Ok(list.unwrap_or_default())
    }

    /// Whether values are made of keys, tensors tell.
    fn global_heads(&self, config: &ModelConfig) -> Result<GlobalHeads> {
        let head_dim = self.optional_size("attention.key_length")?.unwrap_or(config.head_dim);
        let kv_heads = self.kv_heads_of(false)?.unwrap_or(config.kv_head_count);
        Ok(GlobalHeads { head_dim, kv_heads, values_are_keys: false })
    }

    fn flags(&self, key: &str, blocks: usize) -> Result<Option<Vec<bool>>> {
        let Some(key) = gguf_name(key) else { return Ok(None) };
        let key = self.own(key);
        let kind = format!("{blocks} flags, one per block");
        self.optional(&key, &kind, |value| match value {
            Value::Array(Array::Bool(flags)) if flags.len() == blocks => Some(flags.clone()),
            _ => None,
        })
    }

    /// One flag per block; of blocks with short convolutions, no heads of keys and values.
    fn recurrent(&self, blocks: usize) -> Result<Option<Vec<bool>>> {
        if let Some(flags) = self.flags("recurrent_layers", blocks)? {
            return Ok(Some(flags));
        }
        let heads = self.metadata.get(&self.own(KV_HEADS)).and_then(kv_heads_of_blocks);
        match heads {
            Some(heads) if heads.len() == blocks && heads.contains(&0) => {
                Ok(Some(heads.iter().map(|&heads| heads == 0).collect()))
            }
            _ => Ok(None),
        }
    }

    /// One flag per block, or the blocks from one without a window to the next.
    fn windowed(&self, blocks: usize) -> Result<Option<Vec<bool>>> {
        let kind = format!("a number, or {blocks} flags, one per block");
        let key = self.own("attention.sliding_window_pattern");
        self.optional(&key, &kind, |value| match value {
            Value::Array(Array::Bool(flags)) if flags.len() == blocks => Some(flags.clone()),
            _ => {
                let interval = usize::try_from(value.as_u64()?).ok().filter(|&every| every > 0)?;
                Some(every(interval, blocks))
            }
        })
    }
}

/// The key of how many heads of keys and values there are.
const KV_HEADS: &str = "attention.head_count_kv";

/// How many each block has, where that is said block by block.
fn kv_heads_of_blocks(value: &Value) -> Option<Vec<u64>> {
    value.as_array()?.to_u64s()
}

/// A whole number, or an array with one per block if they are equal.
fn as_size(value: &Value) -> Option<usize> {
    let size = match value.as_array() {
        None => value.as_u64()?,
        Some(array) => all_equal(array)?,
    };
    size.try_into().ok()
}

fn all_equal(array: &Array) -> Option<u64> {
    let sizes = array.to_u64s()?;
    let first = *sizes.first()?;
    sizes.iter().all(|&size| size == first).then_some(first)
}
