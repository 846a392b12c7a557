//! What a block keeps of the tokens of a text.

use slim_formats::arch::{BlockSpec, Mixer};
use slim_kernels::{KvCache, KvType};

/// What a block keeps of a text: keys and values, or a state of one size.
pub enum State {
    /// Of attention.
    Cache(KvCache),
    /// Of attention to keys and values of another block, which keeps them.
    Shared,
    /// Of other mixers.
    Recurrent(Recurrent),
}

/// A state that each token changes: it cannot be rolled back.
#[derive(Clone)]
pub struct Recurrent {
    /// The last inputs of the convolution, `[taps - 1, channels]`.
    pub recent: Vec<f32>,
    /// The matrices of a delta net, `[value_heads, key_dim, value_dim]`.
    pub matrices: Vec<f32>,
}

impl State {
    /// Of an empty text of up to `capacity` tokens; `kv_type` is how keys and values are stored,
    /// `None` for f32 numbers.
    pub fn new(
        spec: &BlockSpec,
        hidden_size: usize,
        capacity: usize,
        kv_type: Option<KvType>,
    ) -> Self {
        if spec.shares().is_some() {
            return Self::Shared;
        }
        match (heads_kept(&spec.mixer), kv_type) {
            (Some((heads, head_dim)), Some(kv_type)) => {
                Self::Cache(KvCache::new(kv_type, heads, capacity, head_dim))
            }
            (Some((heads, head_dim)), None) => {
                Self::Cache(KvCache::exact(heads, capacity, head_dim))
            }
            (None, _) => Self::Recurrent(Recurrent::new(spec, hidden_size)),
        }
    }

    /// Bytes that it takes for each token, and for any number of them.
    pub(crate) fn bytes(
        spec: &BlockSpec,
        hidden_size: usize,
        kv_type: Option<KvType>,
    ) -> (u64, u64) {
        match heads_kept(&spec.mixer) {
            _ if spec.shares().is_some() => (0, 0),
            Some((heads, head_dim)) => {
                let of_head = match kv_type {
                    Some(kv_type) => kv_type.row_bytes(head_dim),
                    None => 2 * size_of::<f32>() * head_dim,
                };
                ((heads * of_head) as u64, 0)
            }
            None => {
                let [recent, matrices] = Recurrent::lengths(spec, hidden_size);
                (0, (recent + matrices).saturating_mul(size_of::<f32>() as u64))
            }
        }
    }

    /// Keeps the turned keys, and the values, of the first tokens of a text.
    ///
    /// # Panics
    /// If it is of another mixer than attention.
    pub fn store(&mut self, keys: &[f32], values: &[f32]) {
        self.cache().store(keys, values, 0);
    }

    /// Keys and values.
    ///
    /// # Panics
    /// If it is of another mixer than attention.
    pub(crate) fn cache(&mut self) -> &mut KvCache {
        match self {
            Self::Cache(kv) => kv,
            Self::Recurrent(_) | Self::Shared => panic!("no keys and values are kept here"),
        }
    }

    /// The state of another mixer.
    ///
    /// # Panics
    /// If it is of attention.
    pub(crate) fn recurrent(&mut self) -> &mut Recurrent {
        match self {
            Self::Recurrent(state) => state,
            Self::Cache(_) | Self::Shared => panic!("a block without attention has a state"),
        }
    }
}

/// The heads of keys and values that a mixer keeps of each token, and their channels.
fn heads_kept(mixer: &Mixer) -> Option<(usize, usize)> {
    match mixer {
        Mixer::Attention(attention) => Some((attention.kv_heads, attention.head_dim)),
        Mixer::Latent(latent) => Some((1, latent.kept_dim())),
        Mixer::DeltaNet(_) | Mixer::Convolution(_) => None,
    }
}

impl Recurrent {
    fn new(spec: &BlockSpec, hidden_size: usize) -> Self {
        let [recent, matrices] =
            Self::lengths(spec, hidden_size).map(|length| vec![0.0; length as usize]);
        Self { recent, matrices }
    }

    /// Values of its parts.
    fn lengths(spec: &BlockSpec, hidden_size: usize) -> [u64; 2] {
        let channels = spec.mixer.convolved_channels(hidden_size).unwrap_or(0) as u64;
        let matrices = match spec.mixer {
            Mixer::DeltaNet(net) => net.values() as u64 * net.key_dim as u64,
            Mixer::Attention(_) | Mixer::Latent(_) | Mixer::Convolution(_) => 0,
        };
        [channels * spec.mixer.taps().saturating_sub(1) as u64, matrices]
    }

    /// Forgets all tokens.
    pub(crate) fn clear(&mut self) {
        self.recent.fill(0.0);
        self.matrices.fill(0.0);
    }
}
