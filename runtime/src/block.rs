//! One transformer block, cut where a linear layer's input is ready: execution calls the stages one
//! after the other, calibration quantizes between them.

use slim_formats::{
    Decoder, FormatError, ModelSource, Part, PartMap, Weight,
    arch::{Attention, BlockSpec, Stage, Tensor},
};
use slim_kernels::{AttentionShape, Backend, weight};

use crate::{KvBlock, Positions, Result};

/// What every stage needs.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// What the model computes.
    pub decoder: &'a Decoder,
    /// Where the operations run.
    pub backend: &'a dyn Backend,
}

/// A block: what it computes, and its weights.
#[derive(Clone)]
pub struct Block<'a> {
    /// What it computes.
    pub spec: BlockSpec,
    /// The linear layers, `[rows, cols]`.
    pub layers: PartMap<Weight<'a>>,
    /// The norms, `[hidden]`.
    pub vectors: PartMap<Vec<f32>>,
}

impl<'a> Block<'a> {
    /// Finds the tensors of block `index`.
    ///
    /// # Errors
    /// `Malformed` if one is missing or has the wrong shape.
    pub fn load(source: &'a dyn ModelSource, index: usize) -> Result<Self> {
        let decoder = source.decoder();
        let (mut layers, mut vectors) = (PartMap::new(), PartMap::new());
        for tensor in decoder.tensors_of(index) {
            match tensor.is_matrix() {
                true => layers.insert(tensor.part, find_weight(source, tensor)?),
                false => vectors.insert(tensor.part, find_vector(source, tensor)?),
            }
        }
        Ok(Self { spec: decoder.blocks[index], layers, vectors })
    }

    /// The whole block: `x: [m, hidden]` is updated in place. It may hold several sequences, as for
    /// [`Self::input`].
    ///
    /// # Errors
    /// A kernel refuses its arguments.
    pub fn forward(
        &self,
        context: Context<'_>,
        x: &mut [f32],
        kv: &mut KvBlock,
        positions: &Positions,
    ) -> Result<()> {
        let mut input = Vec::new();
        for stage in self.spec.stages() {
            let from = if stage.reads_residual() { &*x } else { &input };
            input = self.input(stage, context, from, kv, positions)?;
            if stage.adds_to_residual() {
                self.add(stage, context, &input, x)?;
            }
        }
        Ok(())
    }

    /// The input of a stage's layers, `[m, cols]`, made `from` the residual stream or from the
    /// input of the stage before, whichever the stage reads. Keys and values go to `kv`.
    ///
    /// If there are more tokens than `positions`, they are several sequences of as many as that,
    /// each of which goes on from the positions before; the keys and values of the last one stay.
    ///
    /// # Errors
    /// A kernel refuses its arguments.
    pub fn input(
        &self,
        stage: Stage,
        context: Context<'_>,
        from: &[f32],
        kv: &mut KvBlock,
        positions: &Positions,
    ) -> Result<Vec<f32>> {
        match stage {
            Stage::Attention => Ok(self.normed(Part::AttnNorm, context, from)),
            Stage::AttentionOutput => self.attend(context, from, kv, positions),
            Stage::Ffn => Ok(self.normed(Part::FfnNorm, context, from)),
            Stage::FfnOutput => self.activate(context, from),
        }
    }

    /// Adds what the layer of a stage makes of its `input` to the residual stream `x`.
    ///
    /// # Errors
    /// A kernel refuses its arguments.
    ///
    /// # Panics
    /// If the stage does not add to it.
    pub fn add(
        &self,
        stage: Stage,
        context: Context<'_>,
        input: &[f32],
        x: &mut [f32],
    ) -> Result<()> {
        assert!(stage.adds_to_residual(), "{stage:?}");
        let [part] = self.spec.layers_of(stage) else { panic!("{stage:?} has one layer") };
        add(x, &linear(context, self.layers[*part], input)?);
        Ok(())
    }

    fn normed(&self, norm: Part, context: Context<'_>, x: &[f32]) -> Vec<f32> {
        rms_norm(context, x, &self.vectors[norm])
    }

    /// Attention of queries, keys and values made of `input`.
    fn attend(
        &self,
        context: Context<'_>,
        input: &[f32],
        kv: &mut KvBlock,
        positions: &Positions,
    ) -> Result<Vec<f32>> {
        let backend = context.backend;
        let attention = &self.spec.attention;
        let angles = &positions.angles[attention.rope];
        let mut q = linear(context, self.layers[Part::AttnQ], input)?;
        let mut k = linear(context, self.layers[Part::AttnK], input)?;
        let v = linear(context, self.layers[Part::AttnV], input)?;
        let shape = attention_shape(&self.spec, positions.start, positions.count);
        let m = shape.m;
        let mut out = vec![0.0; q.len()];
        let (of_queries, of_keys) = (m.max(1) * shape.query_stride(), m.max(1) * shape.kv_stride());
        let queries = q.chunks_exact_mut(of_queries).zip(out.chunks_exact_mut(of_queries));
        let keys = k.chunks_exact_mut(of_keys).zip(v.chunks_exact(of_keys));
        for ((q, out), (k, v)) in queries.zip(keys) {
            backend.rope(q, attention.heads, angles);
            backend.rope(k, attention.kv_heads, angles);
            kv.store(k, v, shape.start, m);
            backend.attention(q, kv.view(), &shape, out)?;
        }
        Ok(out)
    }

    /// The activations of neurons.
    fn activate(&self, context: Context<'_>, input: &[f32]) -> Result<Vec<f32>> {
        let mut gate = linear(context, self.layers[Part::FfnGate], input)?;
        let up = linear(context, self.layers[Part::FfnUp], input)?;
        context.backend.swiglu(&mut gate, &up);
        Ok(gate)
    }
}

/// The attention of `m` queries in a block, the first of which stands at `start`.
pub fn attention_shape(spec: &BlockSpec, start: usize, m: usize) -> AttentionShape {
    let Attention { heads, kv_heads, head_dim, window, .. } = spec.attention;
    AttentionShape { heads, kv_heads, head_dim, start, m, window }
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
    context.backend.rms_norm(x, weight, context.decoder.norm_epsilon, &mut out);
    out
}

fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

/// A tensor of the model, which must have its shape.
///
/// # Errors
/// `Malformed` if it is missing or has another shape.
pub fn find_weight<'a>(source: &'a dyn ModelSource, tensor: &Tensor) -> Result<Weight<'a>> {
    let (rows, cols) = tensor.shape();
    let place = format!("tensor `{}`", tensor.name);
    let expected = format!("[{rows}, {cols}] by the model's hyperparameters");
    let malformed =
        |found: String| FormatError::malformed(source.path(), place, "", found, expected);
    let Some(found) = source.tensor(&tensor.name)? else {
        return Err(malformed("none".into()).into());
    };
    match weight::shape(found) {
        shape if shape == (rows, cols) => Ok(found),
        (rows, cols) => Err(malformed(format!("[{rows}, {cols}]")).into()),
    }
}

/// A vector of the model as f32.
///
/// # Errors
/// As [`find_weight`]; `UnsupportedType` if it holds no numbers.
pub fn find_vector(source: &dyn ModelSource, tensor: &Tensor) -> Result<Vec<f32>> {
    let found = find_weight(source, tensor)?;
    let mut values = vec![0.0; tensor.dims[0]];
    weight::dequantize_rows(found, 0..1, &mut values)?;
    Ok(values)
}
