//! Files that are shown by other ids than their own, among those that a pod has.

use std::os::fd::OwnedFd;

use bulkhead_vmm_control::{IdMap, IdRange, UserNamespaceError, namespace_with};
use thiserror::Error;

use crate::spec::{IdMapping, IdMappings};

/// Ids by which no files can be shown.
#[derive(Debug, Error)]
pub enum IdsError {
    /// They are more than a pod has.
    #[error("{first} to {last} are not among the {count} that a pod has")]
    Beyond {
        /// The first id by which files are to be shown.
        first: u32,
        /// The last one.
        last: u64,
        /// How many ids a pod has.
        count: u32,
    },
    /// There is no user namespace for them.
    #[error("there is no user namespace for them")]
    Namespace(#[source] UserNamespaceError),
}

/// The user namespace for a mount with mapped ids. By it the VMM sees, and the guest with it, what
/// the mount is to show: the guest's kernel has nothing to map. `range` are the pod's ids on the host.
pub fn namespace(range: IdRange, ids: &IdMappings) -> Result<OwnedFd, IdsError> {
    let maps = |mappings: &Option<Vec<IdMapping>>| {
        let mappings = mappings.iter().flatten();
        mappings
            .map(|mapping| {
                on_host(*mapping, range).map_err(|last| IdsError::Beyond {
                    first: mapping.host,
                    last,
                    count: range.count,
                })
            })
            .collect::<Result<Vec<_>, _>>()
    };
    let (users, groups) = (maps(&ids.uid_mappings)?, maps(&ids.gid_mappings)?);
    namespace_with(&users, &groups).map_err(IdsError::Namespace)
}

/// What is to be an id of the guest is one of the host's that the pod has; or else the last id that
/// it would need.
fn on_host(mapping: IdMapping, range: IdRange) -> Result<IdMap, u64> {
    let end = u64::from(mapping.host) + u64::from(mapping.size);
    match range.first.checked_add(mapping.host) {
        Some(outside) if end <= u64::from(range.count) => Ok(IdMap {
            inside: mapping.container,
            outside,
            count: mapping.size,
        }),
        _ => Err(end.saturating_sub(1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_ids_stay_among_the_pods() {
        let range = IdRange {
            first: 1_000_000,
            count: 262_144,
        };
        let mapping = |container, host, size| IdMapping {
            container,
            host,
            size,
        };
        let map = IdMap {
            inside: 5,
            outside: 1_100_000,
            count: 65_536,
        };
        assert_eq!(on_host(mapping(5, 100_000, 65_536), range), Ok(map));
        assert!(on_host(mapping(0, 262_143, 1), range).is_ok());
        assert_eq!(on_host(mapping(0, 262_143, 2), range), Err(262_144));
        let beyond = u64::from(u32::MAX) * 2 - 1;
        assert_eq!(on_host(mapping(0, u32::MAX, u32::MAX), range), Err(beyond));
    }
}
