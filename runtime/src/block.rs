//! One transformer block, cut where a linear layer's input is ready: execution calls the stages one
//! after the other, calibration quantizes between them.

use slim_formats::{FormatError, ModelConfig, ModelSource, Weight};
use slim_kernels::{AttentionShape, Backend, RopeAngles, weight};

use crate::{KvBlock, Result};

/// What every stage needs.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// Hyperparameters.
    pub config: &'a ModelConfig,
    /// Where the operations run.
    pub backend: &'a dyn Backend,
}

/// The weights of a block of the Llama family. Linear layers are `[rows, cols]`, norms
/// `[hidden_size]`.
#[derive(Clone)]
pub struct Block<'a> {
    /// RMS norm before attention.
    pub attn_norm: Vec<f32>,
    /// `[heads * head_dim, hidden]`.
    pub attn_q: Weight<'a>,
    /// `[kv_heads * head_dim, hidden]`.
    pub attn_k: Weight<'a>,
    /// `[kv_heads * head_dim, hidden]`.
    pub attn_v: Weight<'a>,
    /// `[hidden, heads * head_dim]`.
    pub attn_output: Weight<'a>,
    /// RMS norm before the feed-forward network.
    pub ffn_norm: Vec<f32>,
    /// `[ffn, hidden]`.
    pub ffn_gate: Weight<'a>,
    /// `[ffn, hidden]`.
    pub ffn_up: Weight<'a>,
    /// `[hidden, ffn]`.
    pub ffn_down: Weight<'a>,
}

impl<'a> Block<'a> {
    /// Finds the tensors of block `index`.
    ///
    /// # Errors
    /// `Malformed` if one is missing or has the wrong shape.
    pub fn load(source: &'a dyn ModelSource, index: usize) -> Result<Self> {
        let c = source.config();
        let (q_dim, kv_dim) = (c.head_count * c.head_dim, c.kv_head_count * c.head_dim);
        let (hidden, ffn) = (c.hidden_size, c.ffn_size);
        let linear = |name: &str, rows, cols| {
            find_weight(source, &format!("blk.{index}.{name}.weight"), rows, cols)
        };
        let norm = |name: &str| find_vector(source, &format!("blk.{index}.{name}.weight"), hidden);
        Ok(Self {
            attn_norm: norm("attn_norm")?,
            attn_q: linear("attn_q", q_dim, hidden)?,
            attn_k: linear("attn_k", kv_dim, hidden)?,
            attn_v: linear("attn_v", kv_dim, hidden)?,
            attn_output: linear("attn_output", hidden, q_dim)?,
            ffn_norm: norm("ffn_norm")?,
            ffn_gate: linear("ffn_gate", ffn, hidden)?,
            ffn_up: linear("ffn_up", ffn, hidden)?,
            ffn_down: linear("ffn_down", hidden, ffn)?,
        })
    }

    /// Its linear layers.
    pub fn weights(&self) -> [Weight<'a>; 7] {
        let Self { attn_q, attn_k, attn_v, attn_output, ffn_gate, ffn_up, ffn_down, .. } = self;
        [*attn_q, *attn_k, *attn_v, *attn_output, *ffn_gate, *ffn_up, *ffn_down]
    }

    /// The whole block: `x: [m, hidden]` is updated in place. It may hold several sequences, as for
    /// [`Self::attend`].
    ///
    /// # Errors
    /// As the stages: a kernel refuses its arguments.
    pub fn forward(
        &self,
        context: Context<'_>,
        x: &mut [f32],
        kv: &mut KvBlock,
        start: usize,
        angles: &RopeAngles,
    ) -> Result<()> {
        let attention_input = self.attention_input(context, x);
        let attended = self.attend(context, &attention_input, kv, start, angles)?;
        self.add_attention(context, &attended, x)?;
        let ffn_input = self.ffn_input(context, x);
        let activation = self.ffn_activation(context, &ffn_input)?;
        self.add_ffn(context, &activation, x)
    }

    /// Stage 1: the input of `attn_q`, `attn_k` and `attn_v`, `[m, hidden]`.
    pub fn attention_input(&self, context: Context<'_>, x: &[f32]) -> Vec<f32> {
        rms_norm(context, x, &self.attn_norm)
    }

    /// Stage 2: the input of `attn_output`, `[m, heads * head_dim]`; keys and values of positions
    /// `start ..` go to `kv`.
    ///
    /// If the input has more tokens than `angles`, it holds several sequences of as many as that,
    /// each of which goes on from the `start` positions before; the keys and values of the last one
    /// stay.
    ///
    /// # Errors
    /// A kernel refuses its arguments.
    pub fn attend(
        &self,
        context: Context<'_>,
        input: &[f32],
        kv: &mut KvBlock,
        start: usize,
        angles: &RopeAngles,
    ) -> Result<Vec<f32>> {
        let Context { config, backend } = context;
        let m = 2 * angles.cos.len() / angles.head_dim;
        let mut q = linear(context, self.attn_q, input)?;
        let mut k = linear(context, self.attn_k, input)?;
        let v = linear(context, self.attn_v, input)?;
        let shape = AttentionShape {
            heads: config.head_count,
            kv_heads: config.kv_head_count,
            head_dim: config.head_dim,
            start,
            m,
            window: config.sliding_window,
        };
        let mut out = vec![0.0; q.len()];
        let (of_queries, of_keys) = (m.max(1) * shape.query_stride(), m.max(1) * shape.kv_stride());
        let queries = q.chunks_exact_mut(of_queries).zip(out.chunks_exact_mut(of_queries));
        let keys = k.chunks_exact_mut(of_keys).zip(v.chunks_exact(of_keys));
        for ((q, out), (k, v)) in queries.zip(keys) {
            backend.rope(q, config.head_count, angles);
            backend.rope(k, config.kv_head_count, angles);
            kv.store(k, v, start, m);
            backend.attention(q, kv.view(), &shape, out)?;
        }
        Ok(out)
    }

    /// Stage 3: adds the attention output to `x`.
    ///
    /// # Errors
    /// A kernel refuses its arguments.
    pub fn add_attention(
        &self,
        context: Context<'_>,
        attended: &[f32],
        x: &mut [f32],
    ) -> Result<()> {
        add(x, &linear(context, self.attn_output, attended)?);
        Ok(())
    }

    /// Stage 4: the input of `ffn_gate` and `ffn_up`, `[m, hidden]`.
    pub fn ffn_input(&self, context: Context<'_>, x: &[f32]) -> Vec<f32> {
        rms_norm(context, x, &self.ffn_norm)
    }

    /// Stage 5: the input of `ffn_down`, `[m, ffn]`.
    ///
    /// # Errors
    /// A kernel refuses its arguments.
    pub fn ffn_activation(&self, context: Context<'_>, input: &[f32]) -> Result<Vec<f32>> {
        let mut gate = linear(context, self.ffn_gate, input)?;
        let up = linear(context, self.ffn_up, input)?;
        context.backend.swiglu(&mut gate, &up);
        Ok(gate)
    }

    /// Stage 6: adds the output of the feed-forward network to `x`.
    ///
    /// # Errors
    /// A kernel refuses its arguments.
    pub fn add_ffn(&self, context: Context<'_>, activation: &[f32], x: &mut [f32]) -> Result<()> {
        add(x, &linear(context, self.ffn_down, activation)?);
        Ok(())
    }
}

/// `[m, cols]` to `[m, rows]`.
pub(crate) fn linear(context: Context<'_>, w: Weight<'_>, x: &[f32]) -> Result<Vec<f32>> {
    let (rows, cols) = weight::shape(w);
    let m = x.len() / cols;
    let mut out = vec![0.0; m * rows];
    context.backend.matmul(w, x, m, &mut out)?;
    Ok(out)
}

pub(crate) fn rms_norm(context: Context<'_>, x: &[f32], weight: &[f32]) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    context.backend.rms_norm(x, weight, context.config.norm_epsilon, &mut out);
    out
}

fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

/// The tensor `name`, which must be `[rows, cols]`.
///
/// # Errors
/// `Malformed` if it is missing or has another shape.
pub fn find_weight<'a>(
    source: &'a dyn ModelSource,
    name: &str,
    rows: usize,
    cols: usize,
) -> Result<Weight<'a>> {
    let place = format!("tensor `{name}`");
    let expected = format!("[{rows}, {cols}] by the model's hyperparameters");
    let malformed =
        |found: String| FormatError::malformed(source.path(), place, "", found, expected);
    let Some(found) = source.tensor(name)? else {
        return Err(malformed("none".into()).into());
    };
    match weight::shape(found) {
        shape if shape == (rows, cols) => Ok(found),
        (rows, cols) => Err(malformed(format!("[{rows}, {cols}]")).into()),
    }
}

/// The tensor `name` of `len` values as f32.
///
/// # Errors
/// As [`find_weight`]; `UnsupportedType` if it holds no numbers.
pub fn find_vector(source: &dyn ModelSource, name: &str, len: usize) -> Result<Vec<f32>> {
    let found = find_weight(source, name, 1, len)?;
    let mut values = vec![0.0; len];
    weight::dequantize_rows(found, 0..1, &mut values)?;
    Ok(values)
}
