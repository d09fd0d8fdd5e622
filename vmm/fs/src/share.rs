//! What the guest is given: a directory or a file of the host under a name.

/// How a share may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShareOptions {
    /// Every change is refused with `EROFS`.
    pub read_only: bool,
    /// The guest is the only one that changes it, and so may cache it for as long as it likes.
    pub exclusive: bool,
}
