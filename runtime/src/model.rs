//! A model ready to run: embedding, blocks, output.

use std::{ops::Range, sync::Arc};

use slim_formats::{Decoder, ModelConfig, ModelSource};
use slim_kernels::{
    Backend, Cpu,
    cuda::{Device, KvType},
    weight,
};

use crate::{
    CudaSettings, KvBlock, KvCache, Positions, Result, RuntimeError, Sampler,
    block::{Block, Context},
    cuda::{Input, Segment, Session},
    ends::{Ends, check_tokens},
};

/// Tokens that go through the blocks together: bounds the memory of activations, fills the matrix
/// products.
pub(crate) const PREFILL_BATCH: usize = 512;

/// The most likely tokens that a CUDA device can sort out.
const MAX_TOP: usize = 128;

/// A model: the weights of blocks on the CPU where they lie in its source, copies of the others on
/// CUDA devices.
pub struct Model<'a> {
    config: &'a ModelConfig,
    context: Context<'a>,
    /// The first blocks, on the CPU.
    blocks: Vec<Block<'a>>,
    /// The other blocks, on CUDA devices.
    segments: Vec<Arc<Segment>>,
    kv_type: KvType,
    ends: Ends<'a>,
}

impl<'a> Model<'a> {
    /// Finds and checks every tensor; copies only the norms.
    ///
    /// # Errors
    /// `Malformed` if a tensor is missing or has the wrong shape.
    pub fn load(source: &'a dyn ModelSource, backend: &'a dyn Backend) -> Result<Self> {
        let (config, decoder) = (source.config(), source.decoder());
        let blocks =
            (0..decoder.blocks.len()).map(|i| Block::load(source, i)).collect::<Result<_>>()?;
        let (ends, context) = (Ends::load(source)?, Context { decoder, backend });
        let (segments, kv_type) = (Vec::new(), KvType::F16);
        Ok(Self { config, context, blocks, segments, kv_type, ends })
    }

    /// Loads a model and copies its last blocks to CUDA devices, as many as asked for or as fit.
    ///
    /// # Errors
    /// As [`Self::load`]; `InvalidArgument` if not as many blocks fit as were asked for; `Kernel`
    /// if a device refuses.
    pub fn load_on_cuda(source: &'a dyn ModelSource, settings: &CudaSettings) -> Result<Self> {
        let mut model = Self::load(source, &Cpu)?;
        let ranges = settings.place(source)?;
        model.blocks.truncate(ranges.first().map_or(model.blocks.len(), |range| range.start));
        model.kv_type = settings.kv_type;
        for ((number, device), range) in settings.devices.iter().zip(ranges) {
            if !range.is_empty() {
                let name = format!("cuda:{number}");
                let segment = Segment::load(source, Arc::clone(device), name, range)?;
                model.segments.push(Arc::new(segment));
            }
        }
        Ok(model)
    }

    /// Hyperparameters.
    pub fn config(&self) -> &'a ModelConfig {
        self.config
    }

    /// What it computes.
    pub fn decoder(&self) -> &'a Decoder {
        self.context.decoder
    }

    /// Where the blocks run: the name of a device and its blocks, in their order.
    pub fn placement(&self) -> Vec<(String, Range<usize>)> {
        let cpu = ("cpu".to_owned(), 0..self.blocks.len());
        let segments = self.segments.iter().map(|segment| (segment.device_name(), segment.range()));
        std::iter::once(cpu).chain(segments).filter(|(_, range)| !range.is_empty()).collect()
    }

    /// The CUDA devices that it runs on, in the order of their blocks.
    pub fn devices(&self) -> impl Iterator<Item = &Arc<Device>> {
        self.segments.iter().map(|segment| segment.device())
    }

    /// An empty cache for texts of up to `capacity` tokens.
    ///
    /// # Errors
    /// `Kernel` if a device has no memory for it.
    pub fn new_cache(&self, capacity: usize) -> Result<KvCache> {
        let new_kv = |block: &Block<'_>| KvBlock::new(&block.spec.attention, capacity);
        let blocks = self.blocks.iter().map(new_kv).collect();
        let sessions =
            self.segments.iter().map(|segment| Session::new(segment, capacity, self.kv_type));
        Ok(KvCache { blocks, sessions: sessions.collect::<Result<_>>()?, capacity, position: 0 })
    }

    /// Feeds `tokens` after those that `cache` holds; gives the last hidden states, as the output
    /// layer takes them in: `[tokens.len(), embedding]`.
    ///
    /// # Errors
    /// `InvalidArgument` for a token outside the vocabulary or a full cache; `Kernel` if a device
    /// refuses.
    pub fn forward(&self, tokens: &[u32], cache: &mut KvCache) -> Result<Vec<f32>> {
        self.check(tokens, cache)?;
        let mut states = Vec::with_capacity(tokens.len() * self.decoder().embedding_size);
        for batch in tokens.chunks(PREFILL_BATCH) {
            let x = match self.feed(batch, cache)? {
                Residual::OnHost(x) => x,
                Residual::OnDevice(session) => session.residual(batch.len())?,
            };
            states.extend(in_pool(|| self.ends.states(self.context, &x))?);
        }
        Ok(states)
    }

    /// Feeds `tokens` whose continuation nobody asks for.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn prefill(&self, tokens: &[u32], cache: &mut KvCache) -> Result<()> {
        self.check(tokens, cache)?;
        tokens.chunks(PREFILL_BATCH).try_for_each(|batch| self.feed(batch, cache).map(drop))
    }

    /// Logits of last hidden states: `[m, embedding]` to `[m, vocab]`.
    ///
    /// # Errors
    /// A kernel refuses its arguments.
    pub fn logits(&self, states: &[f32]) -> Result<Vec<f32>> {
        match self.segments.last() {
            Some(segment) => segment.logits(states),
            None => in_pool(|| self.ends.logits(self.context, states)),
        }
    }

    /// Feeds `tokens` and gives the logits that follow the last one, `[vocab]`.
    ///
    /// # Errors
    /// As [`Self::forward`]; `InvalidArgument` if there are no tokens.
    pub fn next_logits(&self, tokens: &[u32], cache: &mut KvCache) -> Result<Vec<f32>> {
        match self.feed_all(tokens, cache)? {
            Residual::OnHost(x) => self.logits_of_last(&x),
            Residual::OnDevice(session) => session.logits(),
        }
    }

    /// Feeds `tokens` and lets `sampler` draw the next one; `recent` are the tokens so far,
    /// `tokens` included.
    ///
    /// # Errors
    /// As [`Self::next_logits`] and [`Sampler::sample`].
    pub fn next_token(
        &self,
        tokens: &[u32],
        cache: &mut KvCache,
        sampler: &mut Sampler,
        recent: &[u32],
    ) -> Result<u32> {
        match (self.feed_all(tokens, cache)?, sampler.deciding_tokens()) {
            (Residual::OnHost(x), _) => sampler.sample(&self.logits_of_last(&x)?, recent),
            // The device sorts; a hundred logits come to the host instead of a hundred thousand.
            (Residual::OnDevice(session), Some(k)) if k <= MAX_TOP => {
                sampler.sample_top(&session.top(k)?, recent)
            }
            (Residual::OnDevice(session), _) => sampler.sample(&session.logits()?, recent),
        }
    }

    /// Bytes of weights that decoding one token reads: every layer, and one row of the embedding.
    pub fn bytes_per_token(&self) -> u64 {
        let on_cpu = self.blocks.iter().flat_map(|block| block.layers.values().copied());
        let on_devices: u64 = self.segments.iter().map(|segment| segment.bytes_per_token()).sum();
        let output = if self.segments.is_empty() { Some(self.ends.output) } else { None };
        on_cpu.chain(output).map(weight::stored_bytes).sum::<u64>() + on_devices
    }

    fn check(&self, tokens: &[u32], cache: &KvCache) -> Result<()> {
        let needed = cache.position + tokens.len();
        if needed > cache.capacity {
            let expected = format!("at most {}, the size of the context", cache.capacity);
            return Err(RuntimeError::invalid_argument("tokens", needed, expected));
        }
        check_tokens(tokens, self.config().vocab_size)
    }

    /// Runs all `tokens` through the blocks, of which there must be one.
    fn feed_all<'c>(&self, tokens: &[u32], cache: &'c mut KvCache) -> Result<Residual<'c>> {
        self.check(tokens, cache)?;
        let last = tokens.len().saturating_sub(1) / PREFILL_BATCH * PREFILL_BATCH;
        let (first, last) = tokens.split_at(last);
        if last.is_empty() {
            return Err(RuntimeError::invalid_argument("tokens", 0, "at least one"));
        }
        for batch in first.chunks(PREFILL_BATCH) {
            self.feed(batch, cache)?;
        }
        self.feed(last, cache)
    }

    /// Runs a batch of tokens through the blocks.
    fn feed<'c>(&self, tokens: &[u32], cache: &'c mut KvCache) -> Result<Residual<'c>> {
        let start = cache.position;
        cache.position += tokens.len();
        let KvCache { blocks, sessions, capacity, .. } = cache;
        let mut x = match (self.blocks.is_empty(), self.segments.is_empty()) {
            (true, false) => None,
            _ => Some(in_pool(|| self.feed_cpu(tokens, blocks, start, *capacity))?),
        };
        let Some((last, others)) = sessions.split_last_mut() else {
            return Ok(Residual::OnHost(x.unwrap_or_default()));
        };
        for session in others {
            session.forward(input(tokens, &x), start, tokens.len())?;
            x = Some(session.residual(tokens.len())?);
        }
        last.forward(input(tokens, &x), start, tokens.len())?;
        Ok(Residual::OnDevice(last))
    }

    /// Embeds a batch of tokens and runs it through the blocks on the CPU.
    fn feed_cpu(
        &self,
        tokens: &[u32],
        kv: &mut [KvBlock],
        start: usize,
        capacity: usize,
    ) -> Result<Vec<f32>> {
        let positions = Positions::new(self.decoder(), start, tokens.len(), capacity);
        let mut x = self.ends.embed(self.context, tokens, &positions)?;
        for (block, kv) in self.blocks.iter().zip(kv) {
            block.forward(self.context, &mut x, kv, &positions)?;
        }
        Ok(x)
    }

    /// The logits that follow the last token of a residual stream.
    fn logits_of_last(&self, x: &[f32]) -> Result<Vec<f32>> {
        let last = &x[x.len() - self.config().hidden_size..];
        in_pool(|| {
            let states = self.ends.states(self.context, last)?;
            self.ends.logits(self.context, &states)
        })
    }
}

/// Where the residual stream is after the last block.
enum Residual<'c> {
    /// `[m, hidden]`.
    OnHost(Vec<f32>),
    OnDevice(&'c mut Session),
}

/// What the next session gets in: what came out before, or the tokens.
fn input<'x>(tokens: &'x [u32], x: &'x Option<Vec<f32>>) -> Input<'x> {
    match x {
        Some(x) => Input::Residual(x),
        None => Input::Tokens(tokens),
    }
}

/// Runs `work` on a thread of the pool: the hundreds of small parallel steps of a token then start
/// there, instead of being handed over one by one from a thread outside.
fn in_pool<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    rayon::scope(|_| work())
}
