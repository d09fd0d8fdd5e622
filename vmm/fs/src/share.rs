//! What the guest is given: a directory or a file of the host under a name.

use std::{collections::BTreeMap, sync::Arc};

use crate::FsError;

/// How a share may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShareOptions {
    /// Every change is refused with `EROFS`.
    pub read_only: bool,
    /// The guest is the only one that changes it, and so may cache it for as long as it likes.
    pub exclusive: bool,
}

/// A directory or a file of the host below the file system's root.
#[derive(Debug)]
pub(crate) struct Share {
    /// Never used again for another share.
    pub(crate) id: u64,
    pub(crate) name: String,
    pub(crate) options: ShareOptions,
}

/// The entries of the file system's root: the shares and their nodes, in the order they came.
#[derive(Debug, Default)]
pub(crate) struct Shares {
    by_id: BTreeMap<u64, (Arc<Share>, u64)>,
    last_id: u64,
}

impl Shares {
    /// A share that is not in the list yet, if its name may be.
    pub(crate) fn draft(&mut self, name: &str, options: ShareOptions) -> Result<Share, FsError> {
        let bytes = name.as_bytes();
        if bytes.is_empty()
            || bytes.len() > crate::abi::NAME_MAX
            || bytes.contains(&b'/')
            || bytes.contains(&0)
            || matches!(bytes, b"." | b"..")
        {
            return Err(FsError::Name(name.to_owned()));
        }
        if self.find(bytes).is_some() {
            return Err(FsError::Taken(name.to_owned()));
        }
        self.last_id += 1;
        Ok(Share {
            id: self.last_id,
            name: name.to_owned(),
            options,
        })
    }

    /// Puts a share with the node of its root into the list.
    pub(crate) fn insert(&mut self, share: Arc<Share>, node: u64) {
        self.by_id.insert(share.id, (share, node));
    }

    /// Takes the share of that name out.
    pub(crate) fn remove(&mut self, name: &str) -> Option<Arc<Share>> {
        let id = self.find(name.as_bytes())?.0.id;
        self.by_id.remove(&id).map(|(share, _)| share)
    }

    /// The share of that name, with the node of its root.
    pub(crate) fn find(&self, name: &[u8]) -> Option<(&Arc<Share>, u64)> {
        self.after(0)
            .find(|(share, _)| share.name.as_bytes() == name)
    }

    /// The shares with a higher id, each with the node of its root.
    pub(crate) fn after(&self, id: u64) -> impl Iterator<Item = (&Arc<Share>, u64)> {
        self.by_id
            .range(id.saturating_add(1)..)
            .map(|(_, (share, node))| (share, *node))
    }
}
