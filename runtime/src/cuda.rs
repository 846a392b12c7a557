//! Blocks on a CUDA device: their weights, and a text on its way through them.

use std::{ops::Range, sync::Arc};

use slim_formats::{ModelConfig, ModelSource, Weight};
use slim_kernels::{
    cuda::{
        Attention, Buffer, Device, Graph, KvCache as KvOfBlock, KvType, Matrix, Norm, Operands,
        Position, RopeTables, Tokens, TopK,
    },
    weight,
};

use crate::{
    Block, Result,
    block::{find_vector, find_weight},
    model::{PREFILL_BATCH, rope_angles},
};

/// Consecutive blocks on one device, the embedding if the first of the model is among them, the
/// output layer if the last is.
pub(crate) struct Part {
    device: Arc<Device>,
    name: String,
    range: Range<usize>,
    config: ModelConfig,
    embedding: Option<Arc<Matrix>>,
    blocks: Vec<BlockOnDevice>,
    output: Option<Output>,
}

struct BlockOnDevice {
    attn_norm: Buffer<f32>,
    attn_q: Matrix,
    attn_k: Matrix,
    attn_v: Matrix,
    attn_output: Matrix,
    ffn_norm: Buffer<f32>,
    ffn_gate: Matrix,
    ffn_up: Matrix,
    ffn_down: Matrix,
}

struct Output {
    norm: Buffer<f32>,
    weight: Arc<Matrix>,
}

impl Part {
    /// Copies the weights of blocks `range` to the device, which the user calls `name`.
    pub fn load(
        source: &dyn ModelSource,
        device: Arc<Device>,
        name: String,
        range: Range<usize>,
    ) -> Result<Self> {
        let config = source.config().clone();
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let matrix = |name: &str| -> Result<Arc<Matrix>> {
            let found = find_weight(source, name, vocab, hidden)?;
            Ok(Arc::new(Matrix::upload(&device, found)?))
        };
        let embedding = (range.start == 0).then(|| matrix("token_embd.weight")).transpose()?;
        let output = if range.end == config.block_count {
            let weight = match (&embedding, config.tied_embeddings) {
                (Some(embedding), true) => Arc::clone(embedding),
                (None, true) => matrix("token_embd.weight")?,
                (_, false) => matrix("output.weight")?,
            };
            let norm = find_vector(source, "output_norm.weight", hidden)?;
            Some(Output { norm: Buffer::upload(&device, &norm)?, weight })
        } else {
            None
        };
        let blocks = range
            .clone()
            .map(|index| BlockOnDevice::upload(&device, &Block::load(source, index)?))
            .collect::<Result<_>>()?;
        Ok(Self { device, name, range, config, embedding, blocks, output })
    }

    /// The device.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// What the user calls the device, and what its maker does.
    pub fn device_name(&self) -> String {
        format!("{} ({})", self.name, self.device.name())
    }

    /// The blocks, counted from the model's first.
    pub fn range(&self) -> Range<usize> {
        self.range.clone()
    }

    /// Bytes of weights that one token reads here.
    pub fn bytes_per_token(&self) -> u64 {
        let blocks = self.blocks.iter().flat_map(BlockOnDevice::matrices);
        let output = self.output.iter().map(|output| &*output.weight);
        blocks.chain(output).map(Matrix::device_bytes).sum()
    }

    /// Logits of normed hidden states: `[m, hidden]` to `[m, vocab]`.
    ///
    /// # Panics
    /// If the output layer is elsewhere.
    pub fn logits(&self, hidden: &[f32]) -> Result<Vec<f32>> {
        let output = self.output.as_ref().expect("the last part holds the output layer");
        let m = hidden.len() / self.config.hidden_size;
        let mut inputs = Operands::zeros(&self.device, m, self.config.hidden_size)?;
        inputs.write(hidden, m)?;
        let mut logits = Buffer::zeros(&self.device, m * self.config.vocab_size)?;
        self.device.matmul(&[&output.weight], &inputs, m, &mut [logits.view_mut()])?;
        Ok(logits.view().read()?)
    }

    /// The norm that follows block `index` of this part, if there is one.
    fn norm_after(&self, index: usize) -> Option<&Buffer<f32>> {
        match self.blocks.get(index + 1) {
            Some(next) => Some(&next.attn_norm),
            None => self.output.as_ref().map(|output| &output.norm),
        }
    }
}

impl BlockOnDevice {
    fn upload(device: &Arc<Device>, block: &Block<'_>) -> Result<Self> {
        let norm = |weight: &[f32]| Buffer::upload(device, weight);
        let matrix = |weight: Weight<'_>| Matrix::upload(device, weight);
        Ok(Self {
            attn_norm: norm(&block.attn_norm)?,
            attn_q: matrix(block.attn_q)?,
            attn_k: matrix(block.attn_k)?,
            attn_v: matrix(block.attn_v)?,
            attn_output: matrix(block.attn_output)?,
            ffn_norm: norm(&block.ffn_norm)?,
            ffn_gate: matrix(block.ffn_gate)?,
            ffn_up: matrix(block.ffn_up)?,
            ffn_down: matrix(block.ffn_down)?,
        })
    }

    fn matrices(&self) -> [&Matrix; 7] {
        [
            &self.attn_q,
            &self.attn_k,
            &self.attn_v,
            &self.attn_output,
            &self.ffn_gate,
            &self.ffn_up,
            &self.ffn_down,
        ]
    }
}

/// What a part gets in.
pub(crate) enum Input<'a> {
    /// The first part of a model: its tokens.
    Tokens(&'a [u32]),
    /// The residual stream that the blocks before left, `[m, hidden]`.
    Residual(&'a [f32]),
}

/// A text on a part: its keys and values, and all memory that a call needs.
pub(crate) struct Session {
    part: Arc<Part>,
    kv: Vec<KvOfBlock>,
    position: Position,
    /// The tokens of a call.
    tokens: Buffer<u32>,
    work: Work,
    /// One token's way through the part, captured when the first one comes.
    step: Option<Graph>,
    top: Option<TopK>,
}

/// What the blocks work in, for up to a batch of tokens.
struct Work {
    attention: Attention,
    tables: RopeTables,
    /// The residual stream, [batch, hidden].
    x: Buffer<f32>,
    q: Buffer<f32>,
    k: Buffer<f32>,
    v: Buffer<f32>,
    gate: Buffer<f32>,
    up: Buffer<f32>,
    normed: Operands,
    attended: Operands,
    activation: Operands,
    /// [vocab]; of the last token.
    logits: Buffer<f32>,
}

impl Session {
    /// An empty text of up to `capacity` tokens.
    pub fn new(part: &Arc<Part>, capacity: usize, kv_type: KvType) -> Result<Self> {
        let (device, c) = (&part.device, &part.config);
        let batch = PREFILL_BATCH.min(capacity);
        let (q_dim, kv_dim) = (c.head_count * c.head_dim, c.kv_head_count * c.head_dim);
        let floats = |width: usize| Buffer::zeros(device, batch * width);
        let operands = |width: usize| Operands::zeros(device, batch, width);
        let new_kv = |_| KvOfBlock::new(device, kv_type, c.kv_head_count, capacity, c.head_dim);
        let kv: Vec<_> = part.blocks.iter().map(new_kv).collect::<slim_kernels::Result<_>>()?;
        let work = Work {
            attention: Attention::new(device, c.head_count, c.sliding_window, &kv[0])?,
            tables: RopeTables::upload(device, &rope_angles(c, 0, capacity))?,
            x: floats(c.hidden_size)?,
            q: floats(q_dim)?,
            k: floats(kv_dim)?,
            v: floats(kv_dim)?,
            gate: floats(c.ffn_size)?,
            up: floats(c.ffn_size)?,
            normed: operands(c.hidden_size)?,
            attended: operands(q_dim)?,
            activation: operands(c.ffn_size)?,
            logits: Buffer::zeros(device, if part.output.is_some() { c.vocab_size } else { 0 })?,
        };
        Ok(Self {
            part: Arc::clone(part),
            kv,
            position: Position::new(device, capacity)?,
            tokens: Buffer::zeros(device, batch)?,
            work,
            step: None,
            top: None,
        })
    }

    /// Runs up to a batch of m tokens, the first of which stands at `start`, through the blocks;
    /// the residual stream stays on the device, and with it, if the output layer is here, the
    /// logits that follow the last token.
    pub fn forward(&mut self, input: Input<'_>, start: usize, m: usize) -> Result<()> {
        self.position.set(start)?;
        match input {
            Input::Tokens(tokens) => self.tokens.view_mut().slice(0..m).write(tokens)?,
            Input::Residual(x) => self.work.x.view_mut().slice(0..x.len()).write(x)?,
        }
        if m > 1 {
            return self.launch(m);
        }
        if self.step.is_none() {
            let device = Arc::clone(&self.part.device);
            self.step = Some(device.capture(|| self.launch(1))?);
        }
        Ok(self.step.as_ref().expect("captured above").launch()?)
    }

    /// The residual stream of the last call, `[m, hidden]`.
    pub fn residual(&self, m: usize) -> Result<Vec<f32>> {
        Ok(self.work.x.view().slice(0..m * self.part.config.hidden_size).read()?)
    }

    /// The logits that follow the last token of the last call.
    pub fn logits(&self) -> Result<Vec<f32>> {
        Ok(self.work.logits.view().read()?)
    }

    /// The `k` largest of those logits with their tokens, the largest first.
    pub fn top(&mut self, k: usize) -> Result<Vec<(u32, f32)>> {
        let device = &self.part.device;
        if self.top.as_ref().is_none_or(|top| top.k() != k) {
            self.top = Some(TopK::new(device, k)?);
        }
        let top = self.top.as_mut().expect("made above");
        device.top_k(self.work.logits.view(), top)?;
        Ok(top.read()?)
    }

    /// Launches every kernel of a call with m tokens.
    fn launch(&mut self, m: usize) -> Result<()> {
        let Self { part, kv, position, tokens, work, .. } = self;
        let (device, config) = (&part.device, &part.config);
        let epsilon = config.norm_epsilon;
        let calls = Tokens { position, m };
        let Work { attention, tables, x, q, k, v, gate, up, normed, attended, activation, logits } =
            work;
        let hidden = m * config.hidden_size;
        if let Some(embedding) = &part.embedding {
            device.embed(embedding, tokens.view().slice(0..m), &mut x.view_mut())?;
        }
        device.rms_norm(
            x.view().slice(0..hidden),
            part.blocks[0].attn_norm.view(),
            epsilon,
            m,
            normed,
        )?;
        for (index, (block, kv)) in part.blocks.iter().zip(kv).enumerate() {
            let qkv = [&block.attn_q, &block.attn_k, &block.attn_v];
            device.matmul(&qkv, normed, m, &mut [q.view_mut(), k.view_mut(), v.view_mut()])?;
            let kv_len = m * block.attn_k.rows();
            let new = [k.view().slice(0..kv_len), v.view().slice(0..kv_len)];
            let mut queries = q.view_mut().slice(0..m * block.attn_q.rows());
            device.rope_store(attention, &mut queries, new, tables, calls, kv)?;
            device.attention(attention, queries.as_view(), kv, calls, attended)?;
            let ffn_norm = Norm { weight: block.ffn_norm.view(), epsilon, out: normed };
            device.matmul_add(
                &block.attn_output,
                attended,
                m,
                &mut x.view_mut(),
                Some(ffn_norm),
            )?;
            let scratch = [&mut gate.view_mut(), &mut up.view_mut()];
            device.matmul_swiglu(
                [&block.ffn_gate, &block.ffn_up],
                normed,
                m,
                scratch,
                activation,
            )?;
            let norm = part.norm_after(index);
            let norm = norm.map(|weight| Norm { weight: weight.view(), epsilon, out: normed });
            device.matmul_add(&block.ffn_down, activation, m, &mut x.view_mut(), norm)?;
        }
        if let Some(output) = &part.output {
            if m > 1 {
                let last = x.view().slice(hidden - config.hidden_size..hidden);
                device.rms_norm(last, output.norm.view(), epsilon, 1, normed)?;
            }
            device.matmul(&[&output.weight], normed, 1, &mut [logits.view_mut()])?;
        }
        Ok(())
    }
}

/// Bytes that a weight takes on a device: packed ones as in their file, others as fp16.
pub(crate) fn bytes_on_device(weight: Weight<'_>) -> u64 {
    let (rows, cols) = weight::shape(weight);
    match weight {
        Weight::Packed(_) | Weight::Bands(_) => weight::stored_bytes(weight) + 4 * rows as u64,
        Weight::Dense(_) => 2 * rows.next_multiple_of(16) as u64 * cols.next_multiple_of(64) as u64,
    }
}
