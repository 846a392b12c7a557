//! A model ready to run: embedding, blocks, output.

#[cfg(test)]
mod tests;

use std::{
    ops::Range,
    path::Path,
    sync::{Arc, OnceLock},
};

use self_cell::self_cell;
use slim_formats::{Decoder, ModelConfig, ModelSource, open_model};
use slim_kernels::{Backend, Cpu, KvType, cuda::Device, weight};

use crate::{
    CudaSettings, Positions, Result, RuntimeError, Sampler, Sequence, State, Tokenizer, Turn,
    Workspace,
    block::{Block, Context, Passage},
    cuda::{Input, Segment, WorkspaceOnDevice},
    ends::Ends,
    identity::Identity,
    sequence::free_memory_bytes,
    turn::{Batch, batches},
};

/// Tokens that go through the blocks together at most: bounds the memory of activations, fills the
/// matrix products.
pub(crate) const PREFILL_BATCH: usize = 512;

/// The most likely tokens that a CUDA device can sort out.
const MAX_TOP: usize = 128;

/// A model: the weights of blocks on the CPU where they lie in its source, copies of the others on
/// CUDA devices.
///
/// It never changes while it runs: what it has read of a text is in a [`Sequence`], what it
/// computes in is a [`Workspace`]. On the CPU any number of threads may run it at a time. On
/// devices one may, which also makes its sequences and workspaces.
pub struct Model {
    weights: Weights,
    backend: &'static dyn Backend,
    /// The blocks behind those of `weights`, on CUDA devices.
    segments: Vec<Segment>,
    /// How keys and values are stored; `None` for f32 numbers, of which nothing is rounded.
    kv_type: Option<KvType>,
    /// Tokens that go through the blocks together at most.
    batch: usize,
    /// What its sequences and workspaces know it by.
    identity: Identity,
    /// Made when it is first asked for.
    tokenizer: OnceLock<Tokenizer>,
}

self_cell! {
    /// A source, and what runs on the CPU of it.
    struct Weights {
        owner: Arc<dyn ModelSource>,
        #[covariant]
        dependent: Layers,
    }
}

/// What borrows its weights from a source.
struct Layers<'a> {
    /// The first blocks of the model.
    blocks: Vec<Block<'a>>,
    ends: Ends<'a>,
}

impl Model {
    /// Opens a model file or folder of any supported kind, to run on the CPU.
    ///
    /// # Errors
    /// Those of [`open_model`] and [`Self::load`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::load(open_model(path.as_ref())?.into(), &Cpu)
    }

    /// Finds and checks every tensor; copies only the norms.
    ///
    /// # Errors
    /// `Malformed` if a tensor is missing or has the wrong shape.
    pub fn load(source: Arc<dyn ModelSource>, backend: &'static dyn Backend) -> Result<Self> {
        let blocks = source.decoder().blocks.len();
        Self::load_first(source, backend, blocks)
    }

    /// With keys and values stored so, in place of f32; on devices [`CudaSettings`] say it.
    #[must_use]
    pub fn with_kv_type(mut self, kv_type: KvType) -> Self {
        self.kv_type = Some(kv_type);
        self
    }

    /// Loads a model and copies its last blocks to CUDA devices, as many as asked for or as fit.
    ///
    /// # Errors
    /// As [`Self::load`]; `InvalidArgument` if not as many blocks fit as were asked for; `Kernel`
    /// if a device refuses.
    pub fn load_on_cuda(source: Arc<dyn ModelSource>, settings: &CudaSettings) -> Result<Self> {
        let ranges = settings.place(&*source)?;
        let on_cpu = ranges.first().map_or(source.decoder().blocks.len(), |range| range.start);
        let mut model = Self::load_first(Arc::clone(&source), &Cpu, on_cpu)?;
        model.kv_type = Some(settings.kv_type);
        model.batch = PREFILL_BATCH.min(settings.context);
        for ((number, device), range) in settings.devices.iter().zip(ranges) {
            if !range.is_empty() {
                let name = format!("cuda:{number}");
                model.segments.push(Segment::load(&*source, Arc::clone(device), name, range)?);
            }
        }
        Ok(model)
    }

    /// The first `blocks` blocks, and the ends.
    fn load_first(
        source: Arc<dyn ModelSource>,
        backend: &'static dyn Backend,
        blocks: usize,
    ) -> Result<Self> {
        let weights = Weights::try_new(source, |source| -> Result<_> {
            let blocks = (0..blocks).map(|index| Block::load(&**source, index));
            Ok(Layers { blocks: blocks.collect::<Result<_>>()?, ends: Ends::load(&**source)? })
        })?;
        Ok(Self {
            weights,
            backend,
            segments: Vec::new(),
            kv_type: None,
            batch: PREFILL_BATCH,
            identity: Identity::default(),
            tokenizer: OnceLock::new(),
        })
    }

    /// Where it comes from.
    pub fn source(&self) -> &dyn ModelSource {
        &**self.weights.borrow_owner()
    }

    /// Hyperparameters.
    pub fn config(&self) -> &ModelConfig {
        self.source().config()
    }

    /// What it computes.
    pub fn decoder(&self) -> &Decoder {
        self.source().decoder()
    }

    /// Its tokenizer.
    ///
    /// # Errors
    /// As [`Tokenizer::of`].
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        match self.tokenizer.get() {
            Some(tokenizer) => Ok(tokenizer),
            None => {
                let tokenizer = Tokenizer::of(self.source())?;
                Ok(self.tokenizer.get_or_init(|| tokenizer))
            }
        }
    }

    /// Where the blocks run: the name of a device and its blocks, in their order.
    pub fn placement(&self) -> Vec<(String, Range<usize>)> {
        let cpu = ("cpu".to_owned(), 0..self.layers().blocks.len());
        let segments = self.segments.iter().map(|segment| (segment.device_name(), segment.range()));
        std::iter::once(cpu).chain(segments).filter(|(_, range)| !range.is_empty()).collect()
    }

    /// The CUDA devices that it runs on, in the order of their blocks.
    pub fn devices(&self) -> impl Iterator<Item = &Arc<Device>> {
        self.segments.iter().map(|segment| segment.device())
    }

    /// An empty text of up to `capacity` tokens.
    ///
    /// # Errors
    /// `InvalidArgument` if the machine has no memory for it, `Kernel` if a device has none.
    pub fn sequence(&self, capacity: usize) -> Result<Sequence> {
        self.check_room(1, capacity)?;
        self.empty_sequence(capacity)
    }

    /// As many empty texts of up to `capacity` tokens each.
    ///
    /// # Errors
    /// As [`Self::sequence`], if the machine has no memory for all of them.
    pub fn sequences(&self, count: usize, capacity: usize) -> Result<Vec<Sequence>> {
        // Their memory is taken as they fill, so each one alone would find room.
        self.check_room(count, capacity)?;
        (0..count).map(|_| self.empty_sequence(capacity)).collect()
    }

    fn empty_sequence(&self, capacity: usize) -> Result<Sequence> {
        let hidden = self.decoder().hidden_size;
        let blocks = self.layers().blocks.iter();
        let blocks =
            blocks.map(|block| State::new(&block.spec, hidden, capacity, self.kv_type)).collect();
        let on_devices = self.kv_type.unwrap_or(KvType::F16);
        let segments = self.segments.iter().map(|segment| segment.sequence(capacity, on_devices));
        let (segments, model) = (segments.collect::<Result<_>>()?, self.identity.clone());
        Ok(Sequence { model, tokens: Vec::new(), capacity, blocks, kept: None, segments })
    }

    /// Refuses texts that would take more memory than is free, where the system tells that: an
    /// allocation that fails ends the process.
    fn check_room(&self, texts: usize, capacity: usize) -> Result<()> {
        let hidden = self.decoder().hidden_size;
        let blocks = self.layers().blocks.iter();
        let bytes = blocks.map(|block| State::bytes(&block.spec, hidden, self.kv_type));
        let (of_token, of_text) = bytes.fold((0u64, 0u64), |sum, block| {
            (sum.0.saturating_add(block.0), sum.1.saturating_add(block.1))
        });
        // Of a state there is a copy, too.
        let of_texts = of_text.saturating_mul(2).saturating_mul(texts as u64);
        let tokens = capacity.saturating_mul(texts);
        let needed = of_token.saturating_mul(tokens as u64).saturating_add(of_texts);
        match free_memory_bytes() {
            Some(free) if needed > free => {
                let found = format!("{tokens} tokens, which take {needed} bytes");
                let fit = free.saturating_sub(of_texts).checked_div(of_token).unwrap_or(0);
                let expected = format!("at most {fit}: {free} bytes of memory are free");
                Err(RuntimeError::invalid_argument("context", found, expected))
            }
            _ => Ok(()),
        }
    }

    /// Memory to compute in.
    ///
    /// # Errors
    /// `Kernel` if a device has none left.
    pub fn workspace(&self) -> Result<Workspace> {
        let segments = self.segments.iter().map(|segment| segment.workspace(self.batch));
        Ok(Workspace { model: self.identity.clone(), segments: segments.collect::<Result<_>>()? })
    }

    /// Feeds every turn's tokens after those that its sequence holds; gives the logits that follow
    /// the last token of each, `[turns, vocab]`.
    ///
    /// On the CPU all turns go through each linear layer together, so that its weights are read
    /// once for all of them; attention is each turn's own. Turns on devices run one after the
    /// other.
    ///
    /// # Accuracy
    /// The logits of a turn do not depend on what the others say. With packed weights they do not
    /// depend on how many tokens come along either; where weights are floats or ggml's blocks, sums
    /// are added up in another order, of an expert with the number of tokens that it gets.
    ///
    /// # Errors
    /// `InvalidArgument`, before anything is computed, for a turn without tokens, a token outside
    /// the vocabulary, more tokens than fit, and a sequence or workspace of another model; `Kernel`
    /// if a device refuses. Either way every sequence holds what it held before, but for a model
    /// with states, whose sequences hold nothing once it has begun to compute.
    pub fn step(&self, turns: &mut [Turn<'_>], workspace: &mut Workspace) -> Result<Vec<f32>> {
        self.check_step(turns, workspace)?;
        let logits = self.logits_of(turns, workspace);
        settle(turns, logits)
    }

    fn logits_of(&self, turns: &mut [Turn<'_>], workspace: &mut Workspace) -> Result<Vec<f32>> {
        // Of turns on the CPU, [turns, hidden]; of those on devices, [turns, vocab].
        let (mut last, mut logits) = (Vec::new(), Vec::new());
        for batch in self.batches(turns) {
            match self.feed(turns, &batch, workspace)? {
                Residual::OnHost(x) => {
                    let width = self.decoder().hidden_size;
                    let rows = batch.last_rows.iter().map(|row| &x[row * width..][..width]);
                    last.extend(rows.flatten());
                }
                Residual::OnDevice(_) if batch.last_rows.is_empty() => {}
                Residual::OnDevice(workspace) => logits.extend(workspace.logits()?),
            }
        }
        if !last.is_empty() {
            logits = self.logits_after(&last)?;
        }
        Ok(logits)
    }

    /// Feeds a turn's tokens and lets `sampler` draw the next one; `recent` are the tokens so far,
    /// those of the turn included.
    ///
    /// # Errors
    /// As [`Self::step`] and [`Sampler::sample`].
    pub fn next_token(
        &self,
        turn: Turn<'_>,
        workspace: &mut Workspace,
        sampler: &mut Sampler,
        recent: &[u32],
    ) -> Result<u32> {
        let turns = &mut [turn];
        self.check_step(turns, workspace)?;
        let token = self.token_after(turns, workspace, sampler, recent);
        settle(turns, token)
    }

    fn token_after(
        &self,
        turns: &mut [Turn<'_>],
        workspace: &mut Workspace,
        sampler: &mut Sampler,
        recent: &[u32],
    ) -> Result<u32> {
        let batches = self.batches(turns);
        let (last, others) = batches.split_last().expect("a turn with tokens");
        for batch in others {
            self.feed(turns, batch, workspace)?;
        }
        match (self.feed(turns, last, workspace)?, sampler.deciding_tokens()) {
            (Residual::OnHost(x), _) => {
                let last = &x[x.len() - self.decoder().hidden_size..];
                sampler.sample(&self.logits_after(last)?, recent)
            }
            // The device sorts; a hundred logits come to the host instead of a hundred thousand.
            (Residual::OnDevice(workspace), Some(k)) if k <= MAX_TOP => {
                sampler.sample_top(&workspace.top(k)?, recent)
            }
            (Residual::OnDevice(workspace), _) => sampler.sample(&workspace.logits()?, recent),
        }
    }

    /// Feeds tokens whose continuation nobody asks for.
    ///
    /// # Errors
    /// As [`Self::step`], but there may be no tokens.
    pub fn prefill(&self, turn: Turn<'_>, workspace: &mut Workspace) -> Result<()> {
        let turns = &mut [turn];
        self.check(turns, workspace)?;
        let mut batches = self.batches(turns).into_iter();
        let done = batches.try_for_each(|batch| self.feed(turns, &batch, workspace).map(drop));
        settle(turns, done)
    }

    /// Feeds tokens; gives the last hidden states of all of them, as the output layer takes them
    /// in: `[tokens.len(), embedding]`.
    ///
    /// # Errors
    /// As [`Self::prefill`].
    pub fn forward(&self, turn: Turn<'_>, workspace: &mut Workspace) -> Result<Vec<f32>> {
        let turns = &mut [turn];
        self.check(turns, workspace)?;
        let states = self.states_of(turns, workspace);
        settle(turns, states)
    }

    fn states_of(&self, turns: &mut [Turn<'_>], workspace: &mut Workspace) -> Result<Vec<f32>> {
        let mut states = Vec::with_capacity(turns[0].tokens.len() * self.decoder().embedding_size);
        for batch in self.batches(turns) {
            let x = match self.feed(turns, &batch, workspace)? {
                Residual::OnHost(x) => x,
                Residual::OnDevice(workspace) => workspace.residual(batch.tokens[0].len())?,
            };
            states.extend(in_pool(|| self.layers().ends.states(self.context(), &x))?);
        }
        Ok(states)
    }

    /// Logits of last hidden states: `[m, embedding]` to `[m, vocab]`.
    ///
    /// # Errors
    /// A kernel refuses its arguments.
    pub fn logits(&self, states: &[f32]) -> Result<Vec<f32>> {
        match self.segments.last() {
            Some(segment) => segment.logits(states),
            None => in_pool(|| self.layers().ends.logits(self.context(), states)),
        }
    }

    /// Bytes of weights that decoding one token reads: every layer, of experts as many as a token
    /// goes through, and one row of the embedding.
    pub fn bytes_per_token(&self) -> u64 {
        let Layers { blocks, ends } = self.layers();
        let of_blocks: u64 = blocks.iter().map(Block::bytes_per_token).sum();
        let on_devices: u64 = self.segments.iter().map(|segment| segment.bytes_per_token()).sum();
        let output = if self.segments.is_empty() { Some(ends.output) } else { None };
        of_blocks + output.map_or(0, weight::stored_bytes) + on_devices
    }

    fn layers(&self) -> &Layers<'_> {
        self.weights.borrow_dependent()
    }

    fn context(&self) -> Context<'_> {
        Context { decoder: self.decoder(), backend: self.backend }
    }

    /// [`Self::check`], for what needs a last token.
    fn check_step(&self, turns: &[Turn<'_>], workspace: &Workspace) -> Result<()> {
        if let Some(empty) = turns.iter().position(|turn| turn.tokens.is_empty()) {
            let error = RuntimeError::invalid_argument("tokens", 0, "at least one");
            return Err(name_turn(error, empty, turns));
        }
        self.check(turns, workspace)
    }

    /// Refuses what cannot be fed, before anything is.
    fn check(&self, turns: &[Turn<'_>], workspace: &Workspace) -> Result<()> {
        self.check_own("workspace", &workspace.model)?;
        for (index, turn) in turns.iter().enumerate() {
            self.check_turn(turn).map_err(|error| name_turn(error, index, turns))?;
        }
        Ok(())
    }

    fn check_turn(&self, Turn { tokens, sequence }: &Turn<'_>) -> Result<()> {
        self.check_own("sequence", &sequence.model)?;
        let needed = sequence.tokens.len() + tokens.len();
        if needed > sequence.capacity {
            let expected = format!("at most {}, the size of the context", sequence.capacity);
            return Err(RuntimeError::invalid_argument("tokens", needed, expected));
        }
        self.layers().ends.check(tokens, sequence.tokens.len())
    }

    fn check_own(&self, what: &str, model: &Identity) -> Result<()> {
        match *model == self.identity {
            true => Ok(()),
            false => {
                let found = "one of another model";
                Err(RuntimeError::invalid_argument(what, found, "one that this model made"))
            }
        }
    }

    /// What goes through the blocks together; a device takes one text at a time.
    fn batches(&self, turns: &[Turn<'_>]) -> Vec<Batch> {
        let lengths = turns.iter().map(|turn| turn.tokens.len());
        batches(lengths, self.batch, self.segments.is_empty())
    }

    /// Runs a batch through the blocks.
    fn feed<'w>(
        &self,
        turns: &mut [Turn<'_>],
        batch: &Batch,
        workspace: &'w mut Workspace,
    ) -> Result<Residual<'w>> {
        let turns = &mut turns[batch.turns.clone()];
        if self.segments.is_empty() {
            return in_pool(|| self.feed_cpu(turns, &batch.tokens)).map(Residual::OnHost);
        }
        let mut x = match self.layers().blocks.is_empty() {
            true => None,
            false => Some(in_pool(|| self.feed_cpu(turns, &batch.tokens))?),
        };
        let ([Turn { tokens, sequence }], [range]) = (turns, &batch.tokens[..]) else {
            panic!("a batch for devices is of one turn");
        };
        let (start, m) = (sequence.tokens.len() + range.start, range.len());
        let mut reached: Option<&mut WorkspaceOnDevice> = None;
        let stops = self.segments.iter().zip(&mut sequence.segments).zip(&mut workspace.segments);
        for ((segment, sequence), workspace) in stops {
            if let Some(before) = reached {
                x = Some(before.residual(m)?);
            }
            let input = match &x {
                Some(x) => Input::Residual(x),
                None => Input::Tokens(&tokens[range.clone()]),
            };
            segment.forward(input, start, m, sequence, workspace)?;
            reached = Some(workspace);
        }
        Ok(Residual::OnDevice(reached.expect("a model on devices has segments")))
    }

    /// Embeds these tokens of each turn and runs them through the blocks on the CPU; gives the
    /// residual stream, `[m, hidden]`.
    fn feed_cpu(&self, turns: &mut [Turn<'_>], tokens: &[Range<usize>]) -> Result<Vec<f32>> {
        let (Layers { blocks, ends }, decoder) = (self.layers(), self.decoder());
        let (mut x, mut positions) = (Vec::new(), Vec::new());
        for (Turn { tokens, sequence }, range) in turns.iter().zip(tokens) {
            let start = sequence.tokens.len() + range.start;
            x.extend(ends.embed(self.context(), &tokens[range.clone()], start)?);
            positions.push(Positions::new(decoder, start, range.len(), sequence.capacity));
        }
        for (Turn { sequence, .. }, range) in turns.iter_mut().zip(tokens) {
            sequence.keep(range);
        }
        let fed = turns.iter().zip(tokens).flat_map(|(turn, range)| &turn.tokens[range.clone()]);
        let embedded = ends.embedded(self.context(), &fed.copied().collect::<Vec<_>>(), &x)?;
        for (index, block) in blocks.iter().enumerate() {
            let state = block.spec.shares().unwrap_or(index);
            let mut of_block = embedded.of_block(index);
            let mut passages = Vec::with_capacity(turns.len());
            for (turn, positions) in turns.iter_mut().zip(&positions) {
                let of_turn = positions.count * block.spec.embedded.unwrap_or(0);
                let embedded = of_block.split_off(..of_turn).expect("embeddings of every turn");
                let state = &mut turn.sequence.blocks[state];
                passages.push(Passage { positions, state, embedded });
            }
            block.forward(self.context(), &mut x, &mut passages)?;
        }
        Ok(x)
    }

    /// The logits that follow these rows of the residual stream, `[m, hidden]` to `[m, vocab]`.
    fn logits_after(&self, x: &[f32]) -> Result<Vec<f32>> {
        in_pool(|| {
            let states = self.layers().ends.states(self.context(), x)?;
            self.layers().ends.logits(self.context(), &states)
        })
    }
}

/// Where the residual stream is after the last block.
enum Residual<'w> {
    /// `[m, hidden]`.
    OnHost(Vec<f32>),
    OnDevice(&'w mut WorkspaceOnDevice),
}

/// Turns have gone through the model: their sequences hold them. If they have not, or what follows
/// them is not known, states are somewhere on the way.
fn settle<T>(turns: &mut [Turn<'_>], done: Result<T>) -> Result<T> {
    for Turn { tokens, sequence } in turns {
        match &done {
            Ok(_) => sequence.tokens.extend_from_slice(tokens),
            Err(_) => sequence.give_up(),
        }
    }
    done
}

/// Says which of several turns is wrong.
fn name_turn(error: RuntimeError, index: usize, turns: &[Turn<'_>]) -> RuntimeError {
    match error {
        RuntimeError::InvalidArgument { what, found, expected } if turns.len() > 1 => {
            RuntimeError::InvalidArgument {
                what: format!("turns[{index}]: {what}"),
                found,
                expected,
            }
        }
        error => error,
    }
}

/// Runs `work` on a thread of the pool: the hundreds of small parallel steps of a token then start
/// there, instead of being handed over one by one from a thread outside.
fn in_pool<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    rayon::scope(|_| work())
}
