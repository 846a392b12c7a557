//! A CUDA device, opened.

use std::{
    env,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use cudarc::{
    driver::{
        CudaContext, CudaFunction, CudaGraph, CudaModule, CudaStream, DriverError, result,
        sys::{
            CUdevice_attribute as Attribute, CUfunction_attribute as FunctionAttribute,
            CUgraphInstantiate_flags, CUresult, CUstreamCaptureMode,
        },
    },
    nvrtc::Ptx,
};

use super::driver::{self, Memory, Uploader, refused};
use crate::{KernelError, Result};

/// The lowest version of CUDA whose drivers load the kernels.
const MIN_CUDA: (u32, u32) = (12, 0);

/// The lowest compute capability that the kernels are compiled for: Ampere, the first with
/// `cp.async`.
const MIN_COMPUTE_CAPABILITY: (u32, u32) = (8, 0);

/// The lowest compute capability whose kernels can start while the one before them ends, and the
/// lowest version of CUDA that captures that in a graph.
const OVERLAP_COMPUTE_CAPABILITY: (u32, u32) = (9, 0);
const OVERLAP_CUDA: (u32, u32) = (12, 3);

/// All kernels, as PTX (`scripts/cuda-ptx`).
pub(super) const PTX: &str = include_str!("../../cuda/kernels.ptx");

/// The kernels for devices on which they overlap: with the instructions that `PTX` only mentions.
fn overlapping_ptx() -> String {
    PTX.replace("//sm_90: ", "").replace(".target sm_80", ".target sm_90")
}

/// A CUDA device, its stream and the kernels on it.
///
/// Threads may share it; work is done in the order in which the calls come.
pub struct Device {
    name: String,
    compute_capability: (u32, u32),
    total_memory: u64,
    multiprocessors: usize,
    /// Bytes of dynamic shared memory that a block may have.
    pub(super) shared_memory: u32,
    /// Whether kernels start while the one before them ends.
    pub(super) overlaps: bool,
    /// Waits for each kernel, so that errors name the one that failed.
    waits_for_kernels: bool,
    /// Quads that a warp of `matvec_raw` may have in shared memory, the best number first. None:
    /// its work is for `matvec_packed`.
    pub(super) ring_depths: Vec<u32>,
    uploader: Mutex<Uploader>,
    /// What the kernels of the graph being captured use.
    captured: Mutex<Option<Vec<Arc<Memory>>>>,
    /// Zeros, also after each kernel that counts its blocks in them.
    pub(super) counters: Arc<Memory>,
    pub(super) kernels: Kernels,
    pub(super) stream: Arc<CudaStream>,
    context: Arc<CudaContext>,
}

impl Device {
    /// How many CUDA devices the machine has.
    ///
    /// # Errors
    /// `NoDriver`; `DriverTooOld`; `Driver`.
    pub fn count() -> Result<usize> {
        if !driver::is_present() {
            return Err(KernelError::NoDriver);
        }
        let found =
            driver::version().map_err(refused("ask for the version of the NVIDIA driver"))?;
        if found < MIN_CUDA {
            return Err(KernelError::DriverTooOld { found, needed: MIN_CUDA });
        }
        match result::init().and_then(|()| result::device::get_count()) {
            Err(DriverError(CUresult::CUDA_ERROR_NO_DEVICE)) => Ok(0),
            count => Ok(count.map_err(refused("count the CUDA devices"))?.unsigned_abs() as usize),
        }
    }

    /// Opens device number `ordinal`, counted from zero, and loads the kernels.
    ///
    /// # Errors
    /// `NoDriver`; `DriverTooOld`; `NoSuchDevice`; `DeviceTooOld`; `Driver`.
    pub fn open(ordinal: usize) -> Result<Arc<Self>> {
        let count = Self::count()?;
        if ordinal >= count {
            return Err(KernelError::NoSuchDevice { ordinal, count });
        }
        let refused = || refused(format!("open CUDA device {ordinal}"));
        let context = CudaContext::new(ordinal).map_err(refused())?;
        driver::disable_event_tracking(&context);
        let name = context.name().map_err(refused())?;
        let attribute =
            |attribute| context.attribute(attribute).map(i32::unsigned_abs).map_err(refused());
        let compute_capability = (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        if compute_capability < MIN_COMPUTE_CAPABILITY {
            let (found, needed) = (compute_capability, MIN_COMPUTE_CAPABILITY);
            return Err(KernelError::DeviceTooOld { name, found, needed });
        }
        let shared_memory =
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?
                - STATIC_SHARED_BYTES;
        let multiprocessors =
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize;
        let total_memory = context.total_mem().map_err(refused())? as u64;
        let overlaps = compute_capability >= OVERLAP_COMPUTE_CAPABILITY
            && driver::version().map_err(refused())? >= OVERLAP_CUDA;
        let ptx = if overlaps { overlapping_ptx() } else { PTX.to_owned() };
        let module =
            context.load_module(Ptx::from_src(ptx)).map_err(driver::refused("load the kernels"))?;
        let kernels = Kernels::load(&module, shared_memory)?;
        let stream = context.new_stream().map_err(refused())?;
        let counters = Arc::new(stream.alloc_zeros(64).map_err(refused())?);
        Ok(Arc::new(Self {
            name,
            compute_capability,
            total_memory,
            multiprocessors,
            shared_memory,
            overlaps,
            ring_depths: ring_depths(env::var("SLIMLLM_CUDA_RING").ok().as_deref()),
            waits_for_kernels: env::var_os("SLIMLLM_CUDA_SYNC").is_some_and(|value| value == "1"),
            uploader: Mutex::new(Uploader::new(Arc::clone(&stream))),
            captured: Mutex::new(None),
            counters,
            kernels,
            stream,
            context,
        }))
    }

    /// What the driver calls it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Major and minor number of its architecture.
    pub fn compute_capability(&self) -> (u32, u32) {
        self.compute_capability
    }

    /// Bytes of its memory.
    pub fn total_memory(&self) -> u64 {
        self.total_memory
    }

    /// Bytes of its memory that nobody uses now.
    ///
    /// # Errors
    /// `Driver`.
    pub fn free_memory(&self) -> Result<u64> {
        let (free, _) =
            self.context.mem_get_info().map_err(refused("ask for the free device memory"))?;
        Ok(free as u64)
    }

    /// How many multiprocessors it has.
    pub fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    /// Waits for all work so far.
    ///
    /// # Errors
    /// `Driver`, also for an earlier kernel that failed.
    pub fn synchronize(&self) -> Result<()> {
        self.stream.synchronize().map_err(refused("finish the work on the device"))
    }

    /// Records the kernels that `work` launches on this device, instead of running them. No other
    /// thread may use the device meanwhile.
    ///
    /// # Errors
    /// Those of `work`; `Driver`.
    ///
    /// # Panics
    /// If a graph is being captured already, or if `work` allocates, writes or reads device memory.
    pub fn capture<E: From<KernelError>>(
        self: &Arc<Self>,
        work: impl FnOnce() -> Result<(), E>,
    ) -> Result<Graph, E> {
        let refused = || refused("capture a graph of kernels");
        {
            let mut captured = self.captured();
            assert!(captured.is_none(), "a graph is being captured already");
            let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
            self.stream.begin_capture(mode).map_err(refused())?;
            *captured = Some(Vec::new());
        }
        let outcome = work();
        let graph = self.stream.end_capture(CUgraphInstantiate_flags(0));
        let memory = self.captured().take().unwrap_or_default();
        outcome?;
        let graph = graph.map_err(refused())?;
        Ok(Graph { graph, device: Arc::clone(self), _memory: memory })
    }

    fn captured(&self) -> MutexGuard<'_, Option<Vec<Arc<Memory>>>> {
        lock(&self.captured)
    }

    /// Keeps `memory` for as long as the graph that is being captured, if one is.
    pub(super) fn keep_for_graph(&self, memory: &Arc<Memory>) {
        if let Some(kept) = &mut *self.captured() {
            kept.push(Arc::clone(memory));
        }
    }

    pub(super) fn is_capturing(&self) -> bool {
        self.captured().is_some()
    }

    /// A kernel has been launched: waits for it, if it was asked to.
    pub(super) fn launched(&self, kernel: &Kernel) -> Result<()> {
        if self.waits_for_kernels && !self.is_capturing() {
            self.stream.synchronize().map_err(refused(format!("run kernel `{}`", kernel.name)))?;
        }
        Ok(())
    }

    /// A graph would hold what the stream does, not what the host meant.
    fn assert_not_capturing(&self) {
        assert!(!self.is_capturing(), "memory is used while a graph is captured");
    }

    /// `bytes` zero bytes.
    pub(super) fn allocate(&self, bytes: usize) -> Result<Memory> {
        self.assert_not_capturing();
        match self.stream.alloc_zeros(bytes) {
            Err(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                Err(KernelError::OutOfDeviceMemory {
                    asked: bytes as u64,
                    free: self.free_memory()?,
                    total: self.total_memory,
                })
            }
            memory => memory.map_err(refused(format!("allocate {bytes} bytes of device memory"))),
        }
    }

    pub(super) fn upload(&self, memory: &Memory, start: usize, bytes: &[u8]) -> Result<()> {
        self.assert_not_capturing();
        lock(&self.uploader).upload(memory, start, bytes).map_err(refused("copy to the device"))
    }

    pub(super) fn download(
        &self,
        memory: &Memory,
        from: Range<usize>,
        bytes: &mut [u8],
    ) -> Result<()> {
        self.assert_not_capturing();
        let copy = self.stream.memcpy_dtoh(&memory.slice(from), bytes);
        copy.and_then(|()| self.stream.synchronize()).map_err(refused("copy from the device"))
    }
}

/// A panic elsewhere leaves nothing half done in what the mutexes of a device guard.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Kernels with their arguments, to be run as one. It keeps the memory that they use.
pub struct Graph {
    /// `None` if there are no kernels.
    graph: Option<CudaGraph>,
    device: Arc<Device>,
    _memory: Vec<Arc<Memory>>,
}

impl Graph {
    /// Runs the kernels, after all work so far.
    ///
    /// # Errors
    /// `Driver`.
    pub fn launch(&self) -> Result<()> {
        let Some(graph) = &self.graph else { return Ok(()) };
        graph.launch().map_err(refused("launch a graph of kernels"))?;
        if self.device.waits_for_kernels {
            self.device.stream.synchronize().map_err(refused("run a graph of kernels"))?;
        }
        Ok(())
    }
}

/// A kernel, ready to be launched.
pub(super) struct Kernel {
    pub name: &'static str,
    pub function: CudaFunction,
}

/// Quads of a ring in `matvec_raw`: 3 or 2, which `copy_async_wait_but` allows, or what is asked
/// for.
fn ring_depths(asked: Option<&str>) -> Vec<u32> {
    const DEPTHS: [u32; 2] = [3, 2];
    let is_asked = |depth: &u32| asked.is_none_or(|asked| asked == depth.to_string());
    DEPTHS.into_iter().filter(is_asked).collect()
}

/// Static shared memory that kernels have at most.
const STATIC_SHARED_BYTES: u32 = 1 << 10;

/// Dynamic shared memory that every kernel may have, and on every device.
const PLAIN_SHARED_BYTES: u32 = 48 << 10;

impl Kernel {
    /// A kernel that asks for up to `shared_bytes` of dynamic shared memory, of the device's `most`
    /// for a block.
    fn load(
        module: &Arc<CudaModule>,
        name: &'static str,
        shared_bytes: u32,
        most: u32,
    ) -> Result<Self> {
        let load = || -> Result<CudaFunction, DriverError> {
            let function = module.load_function(name)?;
            if shared_bytes > PLAIN_SHARED_BYTES {
                let limit = shared_bytes.min(most) as i32;
                function.set_attribute(
                    FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                    limit,
                )?;
            }
            Ok(function)
        };
        let function = load().map_err(refused(format!("load kernel `{name}`")))?;
        Ok(Self { name, function })
    }
}

macro_rules! kernels {
    ($($name:ident: $shared_bytes:expr,)*) => {
        /// Every kernel of `kernels/cuda`, under its name there.
        pub(super) struct Kernels {
            $(pub $name: Kernel,)*
        }

        impl Kernels {
            /// `most`: what a block may have of dynamic shared memory, in bytes.
            fn load(module: &Arc<CudaModule>, most: u32) -> Result<Self> {
                Ok(Self { $($name: Kernel::load(module, stringify!($name), $shared_bytes, most)?,)* })
            }
        }
    };
}

// With the dynamic shared memory that each asks for at most, in bytes.
kernels! {
    activate: 0,
    attention_decode_f16: 0,
    attention_decode_q8: 0,
    attention_prefill_f16: shared::prefill(256),
    attention_prefill_q8: shared::prefill(256),
    embed_dense: 0,
    embed_packed: 0,
    embed_trellis: 0,
    experts_dense: 0,
    experts_packed: 0,
    experts_trellis: 0,
    finish_logits: 0,
    gemm_f32: 0,
    matmul_dense: shared::matmul(shared::MATMUL_STEP, 4),
    matmul_packed: shared::matmul(shared::matmul_item(8), 4),
    matmul_trellis: shared::matmul(shared::matmul_item(8), 4),
    matvec_dense: 0,
    matvec_packed: 0,
    matvec_raw: u32::MAX,
    matvec_trellis: 0,
    norm_add: 0,
    norm_rows: 0,
    rope_store_f16: 0,
    rope_store_q8: 0,
    route: 0,
    top_k: 0,
    weigh_rows: 0,
}

/// What kernels ask for of dynamic shared memory, in bytes, as their comments say.
pub(super) mod shared {
    /// An item of a tile (`packed.cuh`): codes of up to `width` bits, scale records.
    pub const fn slot(width: u32) -> u32 {
        width * 2 * 128 + 256
    }

    /// `matmul.cu`: an item of 8 tiles, with the inputs of 128 tokens.
    pub const fn matmul_item(width: u32) -> u32 {
        128 * 2 * 128 + 8 * slot(width)
    }

    /// The same of a dense matrix: a step of 64 columns.
    pub const MATMUL_STEP: u32 = 128 * 2 * 64 + 16 * 8 * 2 * 64;

    /// `matmul.cu`: the block's work and row scales; items or, when all are done, sums.
    pub const fn matmul(item: u32, stages: u32) -> u32 {
        const SUMS: u32 = 128 * (128 + 4) * 4;
        let items = stages * item;
        128 + 8 * 16 + 8 * 8 * 16 + if items > SUMS { items } else { SUMS }
    }

    /// `raw.cuh`: four words, eight records, and for each bit of the codes a row of 64 columns of
    /// each quarter and half a row between.
    pub const fn quad(width: u32) -> u32 {
        4 * 4 + 8 * 16 + width * (4 * 128 + 64)
    }

    /// `matvec_raw.cu`: inputs and means, and of each of 8 warps a ring of `depth` quads.
    pub const fn raw(cols: u32, quad: u32, depth: u32) -> u32 {
        2 * (cols + 64) + (cols / 64 / 4 + 1) * 16 + 8 * depth * quad
    }

    /// `attention_prefill.cu`: rows of queries, keys and values.
    pub const fn prefill(head_dim: u32) -> u32 {
        let row = head_dim.next_multiple_of(16) + 8;
        128 * (2 * row + if head_dim <= 64 { 72 } else { 136 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ring_depths_are_those_asked_for_or_all() {
        assert_eq!(ring_depths(None), [3, 2]);
        assert_eq!(ring_depths(Some("2")), [2]);
        assert!(ring_depths(Some("0")).is_empty());
    }
}
