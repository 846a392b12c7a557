//! Blocks on a CUDA device: their weights, a text's keys and values, and the memory to compute in.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    sync::Arc,
};

use slim_formats::{
    Decoder, ModelSource, Part, PartMap, Weight,
    arch::{self, BlockSpec, ExpertPart, FIRST_POSITION, QkNorm, Stage, Tensor},
};
use slim_kernels::{
    KvType,
    cuda::{
        Attention, Buffer, Device, ExpertWeights, Experts, Graph, HeadNorms, KvCache as KvOfBlock,
        Matrix, Neurons, Next, Norm, Operands, Position, RopeTables, Rotation, Routed, Scores,
        Tokens, TopK, ViewMut,
    },
    weight,
};

use crate::{
    Block, Positions, Result,
    block::{find_vector, find_weight},
    identity::Identity,
};

/// The norms of a block.
const NORMS: [Part; 6] = [
    Part::AttnNorm,
    Part::AttnQNorm,
    Part::AttnKNorm,
    Part::AttnPostNorm,
    Part::FfnNorm,
    Part::FfnPostNorm,
];

/// Consecutive blocks on one device, the embedding if the first of the model is among them, the
/// output layer if the last is.
pub(crate) struct Segment {
    device: Arc<Device>,
    name: String,
    range: Range<usize>,
    decoder: Decoder,
    embedding: Option<Arc<Matrix>>,
    /// [hidden, embedding], beside the embedding of models whose channels are others.
    up: Option<Arc<Matrix>>,
    /// [positions, hidden], beside the embedding of models that learn them.
    positions: Option<Arc<Matrix>>,
    blocks: Vec<BlockOnDevice>,
    output: Option<Output>,
}

struct BlockOnDevice {
    spec: BlockSpec,
    /// Those of all tokens.
    layers: PartMap<Matrix>,
    norms: PartMap<NormOnDevice>,
    experts: Option<Experts>,
}

struct NormOnDevice {
    weight: Buffer<f32>,
    bias: Option<Buffer<f32>>,
    epsilon: f32,
}

struct Output {
    norm: Option<NormOnDevice>,
    /// [embedding, hidden], of the same models as `up`.
    down: Option<Arc<Matrix>>,
    weight: Arc<Matrix>,
}

impl Segment {
    /// Copies the weights of blocks `range` to the device, which the user calls `name`.
    pub fn load(
        source: &dyn ModelSource,
        device: Arc<Device>,
        name: String,
        range: Range<usize>,
    ) -> Result<Self> {
        let decoder = source.decoder();
        let matrix = |tensor: &Tensor| -> Result<Arc<Matrix>> {
            Ok(Arc::new(Matrix::upload(&device, find_weight(source, tensor)?)?))
        };
        let embedding = (range.start == 0).then(|| matrix(decoder.embedding())).transpose()?;
        let outside = |part: Part| decoder.outside(part).map(matrix).transpose();
        let of_start = |part: Part| if range.start == 0 { outside(part) } else { Ok(None) };
        let (up, positions) = (of_start(Part::EmbeddingUp)?, of_start(Part::Positions)?);
        let output = if range.end == decoder.blocks.len() {
            let weight = match &embedding {
                Some(embedding) if decoder.has_tied_embeddings() => Arc::clone(embedding),
                _ => matrix(decoder.output())?,
            };
            let bias = decoder.outside(Part::OutputNormBias);
            let bias = bias.map(|bias| find_vector(source, bias)).transpose()?;
            let (bias, epsilon) = (bias.as_deref(), decoder.norm_epsilon);
            let norm = decoder.output_norm().map(|norm| {
                NormOnDevice::upload(&device, &find_vector(source, norm)?, bias, epsilon)
            });
            Some(Output { norm: norm.transpose()?, down: outside(Part::EmbeddingDown)?, weight })
        } else {
            None
        };
        let blocks = range
            .clone()
            .map(|index| {
                let block = Block::load(source, index)?;
                BlockOnDevice::upload(&device, &block, decoder.norm_epsilon)
            })
            .collect::<Result<_>>()?;
        let decoder = decoder.clone();
        Ok(Self { device, name, range, decoder, embedding, up, positions, blocks, output })
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
        let blocks = self.blocks.iter().flat_map(|block| block.layers.values());
        let output = self.output.iter().map(|output| &*output.weight);
        let experts = self.blocks.iter().filter_map(|block| block.experts.as_ref());
        blocks.chain(output).map(Matrix::device_bytes).sum::<u64>()
            + experts.map(Experts::bytes_per_token).sum::<u64>()
    }

    /// Logits of last hidden states: `[m, embedding]` to `[m, vocab]`.
    ///
    /// # Panics
    /// If the output layer is elsewhere.
    pub fn logits(&self, states: &[f32]) -> Result<Vec<f32>> {
        let output = self.output.as_ref().expect("the last segment holds the output layer");
        let m = states.len() / self.decoder.embedding_size;
        let mut inputs = Operands::zeros(&self.device, m, self.decoder.embedding_size)?;
        inputs.write(states, m)?;
        let mut logits = Buffer::zeros(&self.device, m * self.decoder.vocab_size)?;
        self.compute_logits(output, &inputs, m, &mut logits.view_mut())?;
        Ok(logits.view().read()?)
    }

    /// The logits of the first `m` of last hidden states.
    fn compute_logits(
        &self,
        output: &Output,
        states: &Operands,
        m: usize,
        logits: &mut ViewMut<'_, f32>,
    ) -> Result<()> {
        let Decoder { logit_scale: scale, logit_softcap: softcap, .. } = self.decoder;
        self.device.matmul(&[&output.weight], states, m, &mut [logits.reborrow()])?;
        if scale != 1.0 || softcap.is_some() {
            self.device.finish_logits(logits, scale, softcap)?;
        }
        Ok(())
    }

    /// What follows block `index` of this segment, if something does.
    fn next_after<'a>(&'a self, index: usize, out: &'a mut Operands) -> Option<Next<'a>> {
        match (self.blocks.get(index + 1), &self.output) {
            (Some(next), _) => Some(next.input(Part::AttnNorm, out)),
            (None, Some(output)) => Some(output.input(out)),
            (None, None) => None,
        }
    }
}

impl Output {
    /// What the product behind the last block takes in.
    fn input<'a>(&'a self, out: &'a mut Operands) -> Next<'a> {
        Next { norm: self.norm.as_ref().map(NormOnDevice::view), out }
    }
}

impl NormOnDevice {
    fn upload(
        device: &Arc<Device>,
        weight: &[f32],
        bias: Option<&[f32]>,
        epsilon: f32,
    ) -> Result<Self> {
        let bias = bias.map(|bias| Buffer::upload(device, bias)).transpose()?;
        Ok(Self { weight: Buffer::upload(device, weight)?, bias, epsilon })
    }

    fn view(&self) -> Norm<'_> {
        let bias = self.bias.as_ref().map(Buffer::view);
        Norm { weight: self.weight.view(), bias, epsilon: self.epsilon }
    }
}

impl BlockOnDevice {
    fn upload(device: &Arc<Device>, block: &Block<'_>, epsilon: f32) -> Result<Self> {
        let Block { spec, layers, vectors } = block;
        let bias_of = |part: Part| part.bias().and_then(|bias| vectors.get(bias));
        let is_of_experts = |part: Part| matches!(part, Part::Router | Part::Expert(..));
        let of_all = layers.iter().filter(|&(part, _)| !is_of_experts(part));
        let of_all = of_all.map(|(part, &layer)| {
            let matrix = Matrix::upload(device, layer)?;
            Ok(match bias_of(part) {
                None => (part, matrix),
                Some(bias) => (part, matrix.with_bias(Buffer::upload(device, bias)?)?),
            })
        });
        let norms = NORMS.into_iter().filter_map(|part| Some((part, vectors.get(part)?)));
        let norms = norms.map(|(part, weight)| {
            let bias = bias_of(part).map(Vec::as_slice);
            Ok((part, NormOnDevice::upload(device, weight, bias, epsilon)?))
        });
        Ok(Self {
            spec: *spec,
            layers: of_all.collect::<Result<_>>()?,
            norms: norms.collect::<Result<_>>()?,
            experts: spec.experts.map(|spec| upload_experts(device, spec, block)).transpose()?,
        })
    }

    /// What a stage's layers take in behind `norm`, or of the residual stream itself if the block
    /// has no such norm.
    fn input<'a>(&'a self, norm: Part, out: &'a mut Operands) -> Next<'a> {
        Next { norm: self.norms.get(norm).map(NormOnDevice::view), out }
    }

    /// Norms queries and keys as a whole, if the block does.
    fn norm_whole(
        &self,
        device: &Device,
        q: &mut ViewMut<'_, f32>,
        k: &mut ViewMut<'_, f32>,
        m: usize,
    ) -> Result<()> {
        if attention_of(&self.spec).qk_norm == Some(QkNorm::Whole) {
            device.norm_in_place(q, self.norms[Part::AttnQNorm].view(), m)?;
            device.norm_in_place(k, self.norms[Part::AttnKNorm].view(), m)?;
        }
        Ok(())
    }

    /// What its queries and keys go through, head by head.
    fn rotation<'a>(&'a self, tables: &'a [RopeTables]) -> Rotation<'a> {
        let arch::Attention { qk_norm, rope, query_scaling, .. } = *attention_of(&self.spec);
        let norms = (qk_norm == Some(QkNorm::Heads)).then(|| {
            let [q, k] = [Part::AttnQNorm, Part::AttnKNorm].map(|part| &self.norms[part]);
            HeadNorms { weights: [q.weight.view(), k.weight.view()], epsilon: q.epsilon }
        });
        Rotation { norms, tables: rope.map(|rope| &tables[rope]), query_scaling }
    }

    /// Adds what the layer of a stage makes of its `input` to the residual stream `x`, by way of
    /// `scratch` if a norm stands behind.
    fn add(
        &self,
        stage: Stage,
        device: &Device,
        input: &Operands,
        m: usize,
        [x, scratch]: [&mut ViewMut<'_, f32>; 2],
        next: Option<Next<'_>>,
    ) -> Result<()> {
        let part = self.spec.output_layer(stage).expect("a stage that adds");
        let (layer, scale) = (&self.layers[part], self.spec.residual_scale);
        if let Some(norm) = self.spec.branch_norm(stage) {
            let norm = self.norms[norm].view();
            device.matmul(&[layer], input, m, &mut [scratch.reborrow()])?;
            return Ok(device.norm_add(scratch.as_view(), norm, scale, x, m, next)?);
        }
        let Some(norm) = self.spec.sum_norm(stage) else {
            return Ok(device.matmul_add(layer, input, m, scale, x, next)?);
        };
        device.matmul_add(layer, input, m, scale, x, None)?;
        device.norm_in_place(x, self.norms[norm].view(), m)?;
        Ok(next.map_or(Ok(()), |next| device.norm(x.as_view(), m, next))?)
    }

    /// The neurons of its network of all tokens.
    fn neurons(&self) -> Neurons<'_> {
        let (gate, up) = (self.layers.get(Part::FfnGate), &self.layers[Part::FfnUp]);
        Neurons { gate, up, activation: self.spec.activation() }
    }

    /// Whether what its network of all tokens gives is weighted.
    fn shares(&self) -> bool {
        self.spec.experts.is_some_and(|experts| experts.shares)
    }

    /// What its queries see.
    fn scores(&self) -> Scores {
        let arch::Attention { window, scale, softcap, .. } = *attention_of(&self.spec);
        Scores { window, scale, softcap }
    }
}

/// The experts of a block.
fn upload_experts(device: &Arc<Device>, spec: arch::Experts, block: &Block<'_>) -> Result<Experts> {
    let layers = |part: ExpertPart| {
        (0..spec.count).map(|index| block.layers[Part::Expert(index, part)]).collect()
    };
    let vector = |part: Part| block.vectors.get(part).map(Vec::as_slice);
    let weights = ExpertWeights {
        router: block.layers[Part::Router],
        router_bias: Part::Router.bias().and_then(vector),
        correction: vector(Part::RouterCorrection),
        share: vector(Part::FfnShare),
        gate: layers(ExpertPart::Gate),
        up: layers(ExpertPart::Up),
        down: layers(ExpertPart::Down),
    };
    Ok(Experts::upload(device, spec, &weights)?)
}

/// The attention of a block.
///
/// # Panics
/// If it has another mixer, which [`crate::CudaSettings::lacks`] refuses.
pub(crate) fn attention_of(spec: &BlockSpec) -> &arch::Attention {
    spec.attention().expect("a block with attention")
}

/// What a segment gets in.
pub(crate) enum Input<'a> {
    /// The first segment of a model: its tokens.
    Tokens(&'a [u32]),
    /// The residual stream that the blocks before left, `[m, hidden]`.
    Residual(&'a [f32]),
}

/// A text on a segment: its keys and values, and what follows from how long it may get.
pub(crate) struct SequenceOnDevice {
    kv: Vec<KvOfBlock>,
    position: Position,
    /// Those of the model's rotary embeddings, which may depend on the capacity.
    tables: Vec<RopeTables>,
    /// How many blocks share a text out, which depends on the capacity, and memory for them.
    attention: Attention,
    step: Option<Step>,
}

/// One token's way through the segment, captured when the first one comes. It reads and writes the
/// memory of one sequence and one workspace: the sequence keeps it, because a workspace serves many
/// sequences, and captures anew if another workspace comes. The graph keeps that memory alive.
struct Step {
    workspace: Identity,
    graph: Graph,
}

/// What the blocks of a segment work in, for up to a batch of tokens.
pub(crate) struct WorkspaceOnDevice {
    identity: Identity,
    device: Arc<Device>,
    hidden_size: usize,
    /// The tokens of a call, [batch].
    tokens: Buffer<u32>,
    /// The residual stream, [batch, hidden].
    x: Buffer<f32>,
    q: Buffer<f32>,
    k: Buffer<f32>,
    v: Buffer<f32>,
    gate: Buffer<f32>,
    up: Buffer<f32>,
    /// What a norm stands behind, [batch, hidden]; empty if there is none.
    added: Buffer<f32>,
    normed: Operands,
    attended: Operands,
    /// Neurons of all tokens, by their number, in which blocks may differ.
    neurons: BTreeMap<usize, Operands>,
    /// Of models with experts.
    routed: Option<Routed>,
    /// Of models whose embeddings have other channels than the residual stream.
    narrow: Option<Narrow>,
    /// [vocab]; of the last token.
    logits: Buffer<f32>,
    top: Option<TopK>,
}

/// Vectors of as many channels as embeddings have.
struct Narrow {
    /// [batch, embedding].
    values: Buffer<f32>,
    inputs: Operands,
}

impl Narrow {
    /// The first `m` of them, as products take them in.
    fn inputs(&mut self, device: &Device, m: usize) -> Result<&Operands> {
        device.norm(self.values.view(), m, Next { norm: None, out: &mut self.inputs })?;
        Ok(&self.inputs)
    }
}

impl Segment {
    /// An empty text of up to `capacity` tokens.
    pub fn sequence(&self, capacity: usize, kv_type: KvType) -> Result<SequenceOnDevice> {
        let Self { device, decoder, blocks, .. } = self;
        let new_kv = |block: &BlockOnDevice| {
            let arch::Attention { kv_heads, head_dim, .. } = *attention_of(&block.spec);
            KvOfBlock::new(device, kv_type, kv_heads, capacity, head_dim)
        };
        let kv: Vec<_> = blocks.iter().map(new_kv).collect::<slim_kernels::Result<_>>()?;
        let angles = Positions::new(decoder, 0, capacity, capacity).angles;
        let tables = angles.iter().map(|angles| RopeTables::upload(device, angles));
        Ok(SequenceOnDevice {
            position: Position::new(device, capacity)?,
            tables: tables.collect::<slim_kernels::Result<_>>()?,
            attention: Attention::new(device, attention_of(&blocks[0].spec).heads, &kv[0])?,
            kv,
            step: None,
        })
    }

    /// Memory to run up to `batch` tokens at a time in.
    pub fn workspace(&self, batch: usize) -> Result<WorkspaceOnDevice> {
        let Self { device, decoder, blocks, .. } = self;
        let (hidden_size, spec) = (decoder.hidden_size, &blocks[0].spec);
        let arch::Attention { heads, kv_heads, head_dim, .. } = *attention_of(spec);
        let ffn = decoder.widest_ffn();
        let widths = decoder.blocks.iter().filter_map(|block| Some(block.ffn?.width));
        let widths: BTreeSet<_> = widths.collect();
        let experts = decoder.blocks.iter().find_map(|block| block.experts);
        let routed = experts.map(|experts| Routed::zeros(device, batch, &experts));
        let floats = |width: usize| Buffer::zeros(device, batch * width);
        let operands = |width: usize| Operands::zeros(device, batch, width);
        let neurons = widths.into_iter().map(|width| Ok((width, operands(width)?)));
        let has_output = self.output.is_some();
        let has_branch_norms = spec.branch_norm(Stage::FfnOutput).is_some();
        let embedding = decoder.embedding_size;
        let narrow = (embedding != hidden_size).then(|| -> Result<Narrow> {
            Ok(Narrow { values: floats(embedding)?, inputs: operands(embedding)? })
        });
        Ok(WorkspaceOnDevice {
            identity: Identity::default(),
            device: Arc::clone(device),
            hidden_size,
            tokens: Buffer::zeros(device, batch)?,
            x: floats(hidden_size)?,
            q: floats(heads * head_dim)?,
            k: floats(kv_heads * head_dim)?,
            v: floats(kv_heads * head_dim)?,
            gate: floats(ffn)?,
            up: floats(ffn)?,
            added: floats(if has_branch_norms { hidden_size } else { 0 })?,
            normed: operands(hidden_size)?,
            attended: operands(heads * head_dim)?,
            neurons: neurons.collect::<Result<_>>()?,
            routed: routed.transpose()?,
            narrow: narrow.transpose()?,
            logits: Buffer::zeros(device, if has_output { decoder.vocab_size } else { 0 })?,
            top: None,
        })
    }

    /// Runs up to a batch of m tokens of a text, the first of which stands at `start`, through the
    /// blocks. The residual stream stays in the workspace, and with it, if the output layer is
    /// here, the logits that follow the last token.
    pub fn forward(
        &self,
        input: Input<'_>,
        start: usize,
        m: usize,
        sequence: &mut SequenceOnDevice,
        workspace: &mut WorkspaceOnDevice,
    ) -> Result<()> {
        sequence.position.set(start)?;
        match input {
            Input::Tokens(tokens) => workspace.tokens.view_mut().slice(0..m).write(tokens)?,
            Input::Residual(x) => workspace.x.view_mut().slice(0..x.len()).write(x)?,
        }
        if m > 1 {
            return self.launch(m, sequence, workspace);
        }
        let step = match sequence.step.take().filter(|s| s.workspace == workspace.identity) {
            Some(step) => step,
            None => Step {
                workspace: workspace.identity.clone(),
                graph: self.device.capture(|| self.launch(1, sequence, workspace))?,
            },
        };
        Ok(sequence.step.insert(step).graph.launch()?)
    }

    /// Launches every kernel of a call with m tokens.
    fn launch(
        &self,
        m: usize,
        sequence: &mut SequenceOnDevice,
        workspace: &mut WorkspaceOnDevice,
    ) -> Result<()> {
        let (device, decoder) = (&self.device, &self.decoder);
        let SequenceOnDevice { kv, position, tables, attention, .. } = sequence;
        let calls = Tokens { position, m };
        let WorkspaceOnDevice {
            tokens,
            x,
            q,
            k,
            v,
            gate,
            up,
            added,
            normed,
            attended,
            neurons,
            routed,
            narrow,
            logits,
            ..
        } = workspace;
        let hidden = m * decoder.hidden_size;
        if let Some(embedding) = &self.embedding {
            let tokens = tokens.view().slice(0..m);
            let scale = decoder.embedding_scale;
            match (&self.up, &mut *narrow) {
                (Some(up), Some(narrow)) => {
                    device.embed(embedding, tokens, scale, &mut narrow.values.view_mut())?;
                    device.matmul(&[up], narrow.inputs(device, m)?, m, &mut [x.view_mut()])?;
                }
                _ => device.embed(embedding, tokens, scale, &mut x.view_mut())?,
            }
        }
        if let Some(positions) = &self.positions {
            device.embed_positions(positions, calls, FIRST_POSITION, &mut x.view_mut())?;
        }
        device.norm(x.view(), m, self.blocks[0].input(Part::AttnNorm, normed))?;
        for (index, (block, kv)) in self.blocks.iter().zip(kv).enumerate() {
            let qkv = [Part::AttnQ, Part::AttnK, Part::AttnV].map(|part| &block.layers[part]);
            device.matmul(&qkv, normed, m, &mut [q.view_mut(), k.view_mut(), v.view_mut()])?;
            let [q_len, kv_len, _] = qkv.map(|layer| m * layer.rows());
            let mut queries = q.view_mut().slice(0..q_len);
            block.norm_whole(device, &mut queries, &mut k.view_mut(), m)?;
            let new = [k.view().slice(0..kv_len), v.view().slice(0..kv_len)];
            let rotation = block.rotation(tables);
            device.rope_store(attention, &mut queries, new, rotation, calls, kv)?;
            let (queries, scores) = (queries.as_view(), block.scores());
            device.attention(attention, queries, scores, kv, calls, attended)?;

            let residual = [&mut x.view_mut(), &mut added.view_mut()];
            let next = Some(block.input(Part::FfnNorm, normed));
            block.add(Stage::MixerOutput, device, attended, m, residual, next)?;
            if let (Some(experts), Some(routed)) = (&block.experts, &mut *routed) {
                let norm = block.norms.get(Part::FfnNorm).map(NormOnDevice::view);
                device.route(experts, x.view(), norm, m, routed)?;
                device.expert_neurons(experts, normed, m, routed)?;
            }
            if let Some(ffn) = block.spec.ffn {
                let neurons = neurons.get_mut(&ffn.width).expect("room for every width");
                let scratch = [&mut gate.view_mut(), &mut up.view_mut()];
                device.matmul_activate(block.neurons(), normed, m, scratch, neurons)?;
                if let (Some(routed), true) = (&*routed, block.shares()) {
                    device.weigh_rows(neurons, routed, m)?;
                }
                let residual = [&mut x.view_mut(), &mut added.view_mut()];
                let is_last = block.experts.is_none();
                let next = if is_last { self.next_after(index, normed) } else { None };
                block.add(Stage::FfnOutput, device, neurons, m, residual, next)?;
            }
            if let (Some(experts), Some(routed)) = (&block.experts, &*routed) {
                let scale = block.spec.scale_of(Stage::ExpertOutput(0));
                device.add_experts(experts, routed, m, scale, &mut x.view_mut())?;
                if let Some(next) = self.next_after(index, normed) {
                    device.norm(x.view(), m, next)?;
                }
            }
        }
        if let Some(output) = &self.output {
            if m > 1 {
                let last = x.view().slice(hidden - decoder.hidden_size..hidden);
                device.norm(last, 1, output.input(normed))?;
            }
            let states = match (&output.down, narrow) {
                (Some(down), Some(narrow)) => {
                    device.matmul(&[down], normed, 1, &mut [narrow.values.view_mut()])?;
                    narrow.inputs(device, 1)?
                }
                _ => &*normed,
            };
            self.compute_logits(output, states, 1, &mut logits.view_mut())?;
        }
        Ok(())
    }
}

impl WorkspaceOnDevice {
    /// The residual stream of the last call, `[m, hidden]`.
    pub fn residual(&self, m: usize) -> Result<Vec<f32>> {
        Ok(self.x.view().slice(0..m * self.hidden_size).read()?)
    }

    /// The logits that follow the last token of the last call.
    pub fn logits(&self) -> Result<Vec<f32>> {
        Ok(self.logits.view().read()?)
    }

    /// The `k` largest of those logits with their tokens, the largest first.
    pub fn top(&mut self, k: usize) -> Result<Vec<(u32, f32)>> {
        if self.top.as_ref().is_none_or(|top| top.k() != k) {
            self.top = Some(TopK::new(&self.device, k)?);
        }
        let top = self.top.as_mut().expect("made above");
        self.device.top_k(self.logits.view(), top)?;
        Ok(top.read()?)
    }
}

/// Bytes that a weight takes on a device: packed ones as in their file, others as fp16.
pub(crate) fn bytes_on_device(weight: Weight<'_>) -> u64 {
    let (rows, cols) = weight::shape(weight);
    match weight.bands() {
        Some(_) => weight::stored_bytes(weight) + 4 * rows as u64,
        None => 2 * rows.next_multiple_of(16) as u64 * cols.next_multiple_of(64) as u64,
    }
}
