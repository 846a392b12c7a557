//! Numbers in device memory.

use std::{marker::PhantomData, ops::Range, sync::Arc};

use bytemuck::Pod;

use super::{Device, driver::Memory};
use crate::{KernelError, Result};

/// Bytes behind each buffer that kernels may read.
const TAIL_BYTES: usize = 16;

/// Numbers in device memory, 256-byte aligned and readable for 16 bytes past their end.
pub struct Buffer<T> {
    device: Arc<Device>,
    memory: Arc<Memory>,
    len: usize,
    numbers: PhantomData<T>,
}

/// Numbers to read: a [`Buffer`] or a part of one.
pub struct View<'a, T> {
    device: &'a Arc<Device>,
    memory: &'a Arc<Memory>,
    first: usize,
    len: usize,
    numbers: PhantomData<&'a [T]>,
}

/// Numbers to write: a [`Buffer`] or a part of one.
pub struct ViewMut<'a, T> {
    view: View<'a, T>,
    numbers: PhantomData<&'a mut [T]>,
}

impl<T: Pod> Buffer<T> {
    /// `len` zeros.
    ///
    /// # Errors
    /// `OutOfDeviceMemory`; `Driver`.
    ///
    /// # Panics
    /// Inside [`Device::capture`].
    pub fn zeros(device: &Arc<Device>, len: usize) -> Result<Self> {
        let memory = Arc::new(
            device.allocate(len.saturating_mul(size_of::<T>()).saturating_add(TAIL_BYTES))?,
        );
        Ok(Self { device: Arc::clone(device), memory, len, numbers: PhantomData })
    }

    /// A copy of `values`.
    ///
    /// # Errors
    /// As [`Self::zeros`].
    ///
    /// # Panics
    /// Inside [`Device::capture`].
    pub fn upload(device: &Arc<Device>, values: &[T]) -> Result<Self> {
        let mut buffer = Self::zeros(device, values.len())?;
        buffer.view_mut().write(values)?;
        Ok(buffer)
    }
}

impl<T> Buffer<T> {
    /// How many numbers it holds.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The device that it lies on.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Bytes of device memory that it takes.
    pub fn device_bytes(&self) -> u64 {
        self.memory.num_bytes() as u64
    }

    /// All of it, to read.
    pub fn view(&self) -> View<'_, T> {
        let Self { device, memory, len, .. } = self;
        View { device, memory, first: 0, len: *len, numbers: PhantomData }
    }

    /// All of it, to write.
    pub fn view_mut(&mut self) -> ViewMut<'_, T> {
        ViewMut { view: self.view(), numbers: PhantomData }
    }
}

impl<T> Drop for Buffer<T> {
    /// While a graph is captured the stream would record that the memory is freed: it goes with the
    /// graph instead.
    fn drop(&mut self) {
        self.device.keep_for_graph(&self.memory);
    }
}

impl<T> Clone for View<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for View<'_, T> {}

impl<'a, T> View<'a, T> {
    /// How many numbers it holds.
    pub fn len(self) -> usize {
        self.len
    }

    /// Whether it holds none.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// A part of it.
    ///
    /// # Panics
    /// If `range` is not inside.
    #[must_use]
    pub fn slice(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {}", self.len);
        Self { first: self.first + range.start, len: range.len(), ..self }
    }

    pub(super) fn device(self) -> &'a Arc<Device> {
        self.device
    }

    pub(super) fn memory(self) -> &'a Arc<Memory> {
        self.memory
    }

    /// Where the numbers lie in the allocation, in bytes.
    pub(super) fn bytes(self) -> Range<usize> {
        let start = self.first * size_of::<T>();
        start..start + self.len * size_of::<T>()
    }
}

impl<T: Pod> View<'_, T> {
    /// Waits for all work so far and copies the numbers to the host.
    ///
    /// # Errors
    /// `Driver`, also for an earlier kernel that failed.
    ///
    /// # Panics
    /// Inside [`Device::capture`].
    pub fn read(self) -> Result<Vec<T>> {
        let mut values = vec![T::zeroed(); self.len];
        self.device.download(self.memory, self.bytes(), bytemuck::cast_slice_mut(&mut values))?;
        Ok(values)
    }
}

impl<'a, T> ViewMut<'a, T> {
    /// How many numbers it holds.
    pub fn len(&self) -> usize {
        self.view.len
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.view.len == 0
    }

    /// A part of it.
    ///
    /// # Panics
    /// If `range` is not inside.
    #[must_use]
    pub fn slice(self, range: Range<usize>) -> Self {
        Self { view: self.view.slice(range), ..self }
    }

    /// The same numbers, to read.
    pub fn as_view(&self) -> View<'_, T> {
        self.view
    }

    /// The same numbers for a shorter time, after which `self` can be used again.
    pub fn reborrow(&mut self) -> ViewMut<'_, T> {
        ViewMut { view: self.view, numbers: PhantomData }
    }
}

impl<T: Pod> ViewMut<'_, T> {
    /// Overwrites the numbers, after all work so far; returns as soon as `values` may change.
    ///
    /// # Errors
    /// `ShapeMismatch` if `values` has another length; `Driver`.
    ///
    /// # Panics
    /// Inside [`Device::capture`].
    pub fn write(self, values: &[T]) -> Result<()> {
        let (found, expected) = (values.len(), self.len());
        if found != expected {
            return Err(KernelError::ShapeMismatch { what: "values", found, expected });
        }
        let View { device, memory, .. } = self.view;
        device.upload(memory, self.view.bytes().start, bytemuck::cast_slice(values))
    }
}
