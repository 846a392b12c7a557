//! Which of several equal things is meant.

use std::sync::Arc;

/// Equal to its clones and to nothing else.
#[derive(Clone, Default)]
pub(crate) struct Identity(Arc<()>);

impl PartialEq for Identity {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}
