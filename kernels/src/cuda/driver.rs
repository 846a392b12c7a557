//! The calls to the driver that are not safe by themselves, launches aside.
#![allow(unsafe_code, reason = "cudarc leaves these checks to the caller")]

use std::{
    ffi::{c_char, c_void},
    ptr,
    sync::Arc,
};

use cudarc::driver::{
    CudaContext, CudaEvent, CudaSlice, CudaStream, DevicePtr, DriverError, PinnedHostSlice, result,
    sys,
};

use super::Graph;
use crate::KernelError;

/// An allocation on the device.
pub(super) type Memory = CudaSlice<u8>;

/// Names what could not be done, and passes on what the driver says about it.
pub(super) fn refused(action: impl Into<String>) -> impl FnOnce(DriverError) -> KernelError {
    |error| {
        let text = |found: Result<&std::ffi::CStr, DriverError>| match found {
            Ok(text) => text.to_string_lossy().into_owned(),
            Err(_) => format!("error {}", error.0 as u32),
        };
        let (name, reason) = (text(error.error_name()), text(error.error_string()));
        KernelError::Driver { action: action.into(), reason, name }
    }
}

/// Whether the driver's library is there; cudarc panics in everything else if it is not.
pub(super) fn is_present() -> bool {
    // SAFETY: loads `libcuda.so`, whose initialisers may run on any thread at any time.
    unsafe { sys::is_culib_present() }
}

/// Major and minor version of CUDA that the driver supports.
pub(super) fn version() -> Result<(u32, u32), DriverError> {
    let mut version = 0;
    // SAFETY: writes one integer, to a place that outlives the call.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }.result()?;
    let version = version.unsigned_abs();
    Ok((version / 1000, version % 1000 / 10))
}

/// Keeps cudarc from recording events for each buffer.
pub(super) fn disable_event_tracking(context: &CudaContext) {
    // SAFETY: the events order streams among each other. A `Device` has one stream, and everything
    // happens on it.
    unsafe { context.disable_event_tracking() };
}

// SAFETY: the driver takes a graph from any thread, one at a time: `Graph` is not `Sync`.
unsafe impl Send for Graph {}

/// How many threads of a kernel are launched, and what each block has of dynamic shared memory.
pub(super) struct LaunchShape {
    pub grid: [u32; 3],
    pub threads: u32,
    pub shared_bytes: u32,
}

/// Launches a kernel behind the others of a stream; `overlaps`: its blocks may start when those of
/// the kernel before have.
///
/// # Safety
/// `arguments` point to the kernel's parameters, in order and of its types, and it may read and
/// write what they point to. If it overlaps, it waits for the kernel before by itself
/// (`wait_for_previous_kernel` in `primitives.cuh`).
pub(super) unsafe fn launch(
    stream: &CudaStream,
    function: sys::CUfunction,
    LaunchShape { grid: [x, y, z], threads, shared_bytes }: LaunchShape,
    overlaps: bool,
    arguments: &mut [*mut c_void],
) -> Result<(), DriverError> {
    let stream = stream.cu_stream();
    if !overlaps {
        // SAFETY: the caller's promise.
        return unsafe {
            result::launch_kernel(
                function,
                (x, y, z),
                (threads, 1, 1),
                shared_bytes,
                stream,
                arguments,
            )
        };
    }
    let mut value = sys::CUlaunchAttributeValue { pad: [c_char::default(); 64] };
    value.programmaticStreamSerializationAllowed = 1;
    let mut attribute = sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: Default::default(),
        value,
    };
    let config = sys::CUlaunchConfig {
        gridDimX: x,
        gridDimY: y,
        gridDimZ: z,
        blockDimX: threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: shared_bytes,
        hStream: stream,
        attrs: &raw mut attribute,
        numAttrs: 1,
    };
    // SAFETY: the caller's promise; the driver copies the configuration.
    unsafe {
        sys::cuLaunchKernelEx(&raw const config, function, arguments.as_mut_ptr(), ptr::null_mut())
    }
    .result()
}

/// The address of a byte of an allocation. It is the stream's business when it may be used.
pub(super) fn address(memory: &Memory, byte: usize) -> u64 {
    memory.device_ptr(memory.stream()).0 + byte as u64
}

/// The way of host memory to the device: large uploads go through two pieces of page-locked memory
/// by turns, so that the host fills one while the device copies from the other.
pub(super) struct Uploader {
    stream: Arc<CudaStream>,
    pieces: Option<[Piece; 2]>,
}

struct Piece {
    memory: PinnedHostSlice<u8>,
    /// Passed when the device has copied the piece.
    copied: CudaEvent,
}

impl Uploader {
    const PIECE_BYTES: usize = 16 << 20;
    /// Fewer bytes are left to the driver, which has page-locked memory of its own for them.
    const MIN_STAGED_BYTES: usize = 1 << 20;

    pub fn new(stream: Arc<CudaStream>) -> Self {
        Self { stream, pieces: None }
    }

    /// Copies `bytes` to `memory` from byte `start` on, after all work so far; returns as soon as
    /// `bytes` may change.
    ///
    /// # Panics
    /// If they do not fit.
    pub fn upload(
        &mut self,
        memory: &Memory,
        start: usize,
        bytes: &[u8],
    ) -> Result<(), DriverError> {
        assert!(start + bytes.len() <= memory.len(), "an upload past the end");
        self.stream.context().bind_to_thread()?;
        if bytes.len() < Self::MIN_STAGED_BYTES {
            // SAFETY: the bytes fit (above). They are not page-locked: the driver has copied them
            // when it returns.
            return unsafe {
                result::memcpy_htod_async(address(memory, start), bytes, self.stream.cu_stream())
            };
        }
        let pieces = match &mut self.pieces {
            Some(pieces) => pieces,
            none => none.insert([Piece::new(&self.stream)?, Piece::new(&self.stream)?]),
        };
        for (i, bytes) in bytes.chunks(Self::PIECE_BYTES).enumerate() {
            let piece = &mut pieces[i % 2];
            piece.copied.synchronize()?;
            let staged = &mut piece.memory.as_mut_slice()?[..bytes.len()];
            staged.copy_from_slice(bytes);
            let to = address(memory, start + i * Self::PIECE_BYTES);
            // SAFETY: the bytes fit (above). The piece is not touched before the event below has
            // passed.
            unsafe { result::memcpy_htod_async(to, staged, self.stream.cu_stream()) }?;
            piece.copied.record(&self.stream)?;
        }
        Ok(())
    }
}

impl Drop for Uploader {
    /// The pieces must not go while the device copies from them. There is nobody to tell of an
    /// error.
    fn drop(&mut self) {
        let _ = self.stream.synchronize();
    }
}

impl Piece {
    fn new(stream: &CudaStream) -> Result<Self, DriverError> {
        let context = stream.context();
        // SAFETY: the driver hands out mapped memory; whatever a byte of it holds is a `u8`.
        let memory = unsafe { context.alloc_pinned_with_flags(Uploader::PIECE_BYTES, 0) }?;
        Ok(Self { memory, copied: context.new_event(None)? })
    }
}
