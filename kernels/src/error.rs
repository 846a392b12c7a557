//! The one error type of this crate.

use std::fmt;

use slim_formats::{DType, arch::Activation};

/// Shorthand for results of this crate.
pub type Result<T, E = KernelError> = std::result::Result<T, E>;

/// Why an operation could not be done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// Two arguments do not fit each other.
    #[error("{what}: found {found}, expected {expected}")]
    ShapeMismatch {
        /// The quantity, as a plural noun.
        what: &'static str,
        /// What was passed.
        found: usize,
        /// What the other arguments ask for.
        expected: usize,
    },
    /// Tensors of this type hold no weights that could be computed with.
    #[error("cannot compute with tensors of type {dtype:?}")]
    UnsupportedType {
        /// The type.
        dtype: DType,
    },
    /// The device has no code for it.
    #[error("cannot compute {activation:?} on a CUDA device")]
    UnsupportedActivation {
        /// The activation.
        activation: Activation,
    },
    /// A Hessian could not be factored.
    #[error("a {size} x {size} matrix is not positive definite")]
    NotPositiveDefinite {
        /// Rows and columns.
        size: usize,
    },
    /// A weight that fp16 arithmetic has no number for.
    #[error("row {row} of a weight holds {value}, which fp16 cannot represent")]
    Unrepresentable {
        /// The row.
        row: usize,
        /// The weight, scale or offset.
        value: f32,
    },
    /// The arguments are right, but larger than a kernel can count.
    #[error("{what}: found {found}, the kernels take at most {limit}")]
    TooLarge {
        /// The quantity, as a plural noun.
        what: &'static str,
        /// What was passed.
        found: usize,
        /// The largest that works.
        limit: usize,
    },
    /// The machine has no NVIDIA driver.
    #[error("no NVIDIA driver was found")]
    NoDriver,
    /// The driver is older than the kernels.
    #[error("the NVIDIA driver supports CUDA {}.{}, the kernels need {}.{}", found.0, found.1, needed.0, needed.1)]
    DriverTooOld {
        /// Major and minor version of CUDA that the driver supports.
        found: (u32, u32),
        /// The lowest that works.
        needed: (u32, u32),
    },
    /// There is no such CUDA device.
    #[error("there is no CUDA device {ordinal}: {}", Devices(*count))]
    NoSuchDevice {
        /// The number asked for, from zero.
        ordinal: usize,
        /// The devices that there are.
        count: usize,
    },
    /// The device is older than the kernels.
    #[error(
        "`{name}` has compute capability {}.{}, the kernels need {}.{}",
        found.0, found.1, needed.0, needed.1
    )]
    DeviceTooOld {
        /// The device.
        name: String,
        /// Its compute capability.
        found: (u32, u32),
        /// The lowest that works.
        needed: (u32, u32),
    },
    /// The device has too little free memory.
    #[error(
        "cannot allocate {} MiB of device memory: {} of {} MiB are free",
        Mebibytes(*asked), Mebibytes(*free), Mebibytes(*total)
    )]
    OutOfDeviceMemory {
        /// Bytes asked for.
        asked: u64,
        /// Bytes free.
        free: u64,
        /// Bytes of the device.
        total: u64,
    },
    /// The driver refused, for a reason that none of the variants above stands for.
    #[error("cannot {action}: {reason} ({name})")]
    Driver {
        /// What was tried, as the rest of "cannot ...".
        action: String,
        /// The driver's sentence about the error.
        reason: String,
        /// The driver's name of the error.
        name: String,
    },
}

impl KernelError {
    /// One sentence of advice, where one helps.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::NoDriver => {
                "install the NVIDIA driver, version 525 or later, or compute on the CPU"
            }
            Self::DriverTooOld { .. } => "update the NVIDIA driver to version 525 or later",
            Self::NoSuchDevice { count: 0, .. } => "compute on the CPU",
            Self::NoSuchDevice { .. } => "devices are numbered from 0; `nvidia-smi` lists them",
            Self::DeviceTooOld { .. } => {
                "use a device of the Ampere generation or later, or compute on the CPU"
            }
            Self::OutOfDeviceMemory { .. } => {
                "use a smaller context or fewer bits per weight, end other programs that use the device, or compute on the CPU"
            }
            Self::Driver { .. } => "set SLIMLLM_CUDA_SYNC=1 to see which kernel fails",
            _ => return None,
        };
        Some(hint.into())
    }
}

/// Prints how many devices there are.
struct Devices(usize);

impl fmt::Display for Devices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => f.write_str("this machine has none"),
            1 => f.write_str("this machine has one, number 0"),
            count => write!(f, "this machine has {count}, numbers 0 to {}", count - 1),
        }
    }
}

/// Prints bytes as whole mebibytes, rounded up.
struct Mebibytes(u64);

impl fmt::Display for Mebibytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.div_ceil(1 << 20))
    }
}
