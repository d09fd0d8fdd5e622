//! A root that somebody has mounted already as an overlay, as Docker does: what it is made of.
//!
//! Such a mount cannot be idmapped, but its layers can be mounted once more, idmapped.

use std::{
    fs, io,
    path::{Component, Path, PathBuf},
};

use containerd_shim_protos::api::Mount;
use rustix::{
    fs::{AtFlags, CWD, StatxFlags, statx},
    io::Errno,
    mount::{UnmountFlags, mount_bind, unmount},
};
use thiserror::Error;

use crate::mount_table::{self, Line, plain};

/// The directory beside the upper layer that is the work directory of the second mount. The kernel
/// empties the one that a mount is given, whoever else works in it.
const WORK: &str = "bulkhead-work";

/// An overlay that cannot be read.
#[derive(Debug, Error)]
pub enum OverlayError {
    /// The mount point cannot be looked at.
    #[error("Cannot look at the mount {path}")]
    Look {
        /// The mount point.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// Its line in the list of mounts is not as it should be.
    #[error(
        "Cannot read the options of the overlay {path} in {}",
        mount_table::PATH
    )]
    Line {
        /// The mount point.
        path: PathBuf,
    },
    /// Where a relative name leads is known to whoever mounted it alone.
    #[error("The overlay {path} has the layer {layer}, relative to an unknown directory")]
    Relative {
        /// The mount point.
        path: PathBuf,
        /// The layer.
        layer: PathBuf,
    },
    /// An option whose meaning is not known here.
    #[error("The overlay {path} has the option {option}, which is not supported")]
    Option {
        /// The mount point.
        path: PathBuf,
        /// The option's name.
        option: String,
    },
    /// There is no work directory for the second mount, or the first one's cannot be kept.
    #[error("Cannot prepare the work directory {path}")]
    Work {
        /// The directory.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
}

/// An overlay that is mounted.
#[derive(Debug, Clone, PartialEq)]
pub struct Overlay {
    /// Where.
    pub path: PathBuf,
    /// How to mount the same layers again.
    mount: Mount,
    /// The work directory for that, unless all layers are read-only.
    work: Option<PathBuf>,
    /// What the kernel makes anew in the work directory of the first mount.
    first_work: Option<PathBuf>,
}

impl Overlay {
    /// The overlay of which `path` is the mount point, if it is one.
    pub fn at(path: &Path) -> Result<Option<Self>, OverlayError> {
        let failed = |source: io::Error| OverlayError::Look {
            path: path.to_owned(),
            source,
        };
        // The number tells it from what it may cover.
        let stat = statx(CWD, path, AtFlags::NO_AUTOMOUNT, StatxFlags::MNT_ID)
            .map_err(|errno| failed(errno.into()))?;
        let path = fs::canonicalize(path).map_err(failed)?;
        let table = fs::read(mount_table::PATH).map_err(failed)?;
        match mount_table::lines(&table).find(|line| line.id == stat.stx_mnt_id) {
            Some(line) if is_overlay_at(&line, &path) => Self::from_line(&line, path).map(Some),
            _ => Ok(None),
        }
    }

    fn from_line(line: &Line<'_>, path: PathBuf) -> Result<Self, OverlayError> {
        let unreadable = || OverlayError::Line { path: path.clone() };
        let options = line.options.split(|byte| *byte == b',').map(plain);
        let mut known = Vec::new();
        for option in options {
            known.push(option.into_string().map_err(|_| unreadable())?);
        }
        if line.is_read_only() {
            known.push("ro".to_owned());
        }
        let upper = known
            .iter()
            .find_map(|option| option.strip_prefix("upperdir="));
        let home = match upper {
            Some(upper) => home(&path, Path::new(upper)),
            None => None,
        };
        let absolute = |layer: &str| match (&home, Path::new(layer).is_absolute()) {
            (_, true) => Ok(layer.to_owned()),
            (Some(home), false) => Ok(format!("{home}/{layer}")),
            (None, false) => Err(OverlayError::Relative {
                path: path.clone(),
                layer: layer.into(),
            }),
        };
        let (mut work, mut first_work) = (None, None);
        let mut options = Vec::new();
        for option in &known {
            options.push(match option.split_once('=') {
                Some(("lowerdir", layers)) => {
                    let layers = crate::assembly::split_layers(layers).map(|layer| {
                        if layer.is_empty() {
                            Ok(String::new())
                        } else {
                            absolute(layer)
                        }
                    });
                    let layers = layers.collect::<Result<Vec<_>, _>>()?;
                    format!("lowerdir={}", layers.join(":"))
                }
                Some(("upperdir", upper)) => {
                    let upper = absolute(upper)?;
                    let parent = crate::assembly::unescape(&upper);
                    work = parent.parent().map(|parent| parent.join(WORK));
                    format!("upperdir={upper}")
                }
                Some(("workdir", work)) => {
                    let work = absolute(work)?;
                    first_work = Some(crate::assembly::unescape(&work).join("work"));
                    continue;
                }
                Some((name @ ("lowerdir+" | "datadir+"), _)) => {
                    return Err(OverlayError::Option {
                        path,
                        option: name.to_owned(),
                    });
                }
                // What a security module adds when it shows a mount.
                None if option == "seclabel" => continue,
                _ => option.clone(),
            });
        }
        if let Some(work) = &work {
            options.push(format!("workdir={}", crate::assembly::escape(work)));
        }
        let mount = Mount {
            type_: "overlay".into(),
            source: "overlay".into(),
            options,
            ..Mount::default()
        };
        Ok(Self {
            path,
            mount,
            work,
            first_work,
        })
    }

    /// The mount that shows the same files, once [`Overlay::prepare`] was called.
    pub fn mount(&self) -> Mount {
        self.mount.clone()
    }

    /// Makes what the second mount needs, and has any third one of these layers be read-only: a
    /// daemon that starts anew may mount them over again, and what is changed through that is not
    /// noticed by the second, which then fails to change the same directories.
    pub fn prepare(&self) -> Result<(), OverlayError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| OverlayError::Work { path, source }
        };
        let Some(work) = &self.work else {
            return Ok(());
        };
        match fs::create_dir(work) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(failed(work)(error));
            }
            _ => {}
        }
        // A mount point cannot be removed, and without a new directory there overlayfs is read-only.
        if let Some(first) = &self.first_work {
            mount_bind(first, first).map_err(|errno| failed(first)(errno.into()))?;
        }
        Ok(())
    }

    /// Takes it away again, after the mount.
    pub fn clean_up(&self) {
        let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
        if let Some(first) = &self.first_work
            && let Err(errno) = unmount(first, flags)
            && errno != Errno::INVAL
        {
            let work = first.display();
            tracing::warn!(%work, %errno, "Cannot release an overlay's work directory");
        }
        if let Some(work) = &self.work
            && let Err(error) = fs::remove_dir_all(work)
            && error.kind() != io::ErrorKind::NotFound
        {
            let work = work.display();
            tracing::warn!(%work, %error, "Cannot remove an overlay's work directory");
        }
    }
}

/// The directory that relative names of layers start from, where that can be known.
///
/// Docker names layers relative to its own directory when the options would be too long otherwise,
/// and mounts on a sibling of the upper layer, so that both are in one subdirectory of it. The kernel
/// shows the names as they were given.
fn home<'a>(path: &'a Path, upper: &Path) -> Option<&'a str> {
    let mut components = upper.components();
    let (Some(Component::Normal(container)), Some(Component::Normal(_)), None) =
        (components.next(), components.next(), components.next())
    else {
        return None;
    };
    let directory = path.parent()?;
    let home = directory.parent()?;
    // A name with a backslash would have to be escaped among the options.
    let home = home.to_str().filter(|home| !home.contains(['\\', ':']))?;
    (directory.file_name() == Some(container)).then_some(home)
}

fn is_overlay_at(line: &Line<'_>, path: &Path) -> bool {
    let whole = line.root == b"/" && line.kind == b"overlay";
    whole && line.point() == path
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str, path: &str) -> Result<Overlay, OverlayError> {
        let line = Line::parse(line.as_bytes()).unwrap();
        assert!(is_overlay_at(&line, Path::new(path)), "{path}");
        Overlay::from_line(&line, path.into())
    }

    #[test]
    fn layers_are_read_from_the_list_of_mounts() {
        let overlay = read(
            "42 38 0:31 / /d/o\\0402/ID/merged rw,relatime shared:2 - overlay overlay \
             rw,seclabel,lowerdir=/d/l/A:/d/l/B,upperdir=/d/o\\0402/ID/diff,\
             workdir=/d/o\\0402/ID/w,index=off",
            "/d/o 2/ID/merged",
        )
        .unwrap();
        assert_eq!(
            overlay.mount.options,
            [
                "rw",
                "lowerdir=/d/l/A:/d/l/B",
                "upperdir=/d/o 2/ID/diff",
                "index=off",
                "workdir=/d/o 2/ID/bulkhead-work"
            ]
        );
        assert_eq!(overlay.work, Some("/d/o 2/ID/bulkhead-work".into()));
        assert_eq!(overlay.first_work, Some("/d/o 2/ID/w/work".into()));
    }

    #[test]
    fn relative_layers_are_dockers_or_refused() {
        let line = |upper: &str| {
            format!(
                "42 38 0:31 / /d/overlay2/ID/merged rw - overlay overlay \
                 rw,lowerdir=l/A:l/B,upperdir={upper},workdir=ID/work"
            )
        };
        let overlay = read(&line("ID/diff"), "/d/overlay2/ID/merged").unwrap();
        assert_eq!(
            overlay.mount.options[1..],
            [
                "lowerdir=/d/overlay2/l/A:/d/overlay2/l/B",
                "upperdir=/d/overlay2/ID/diff",
                "workdir=/d/overlay2/ID/bulkhead-work"
            ]
        );
        for other in ["XY/diff", "../ID/diff", "diff", "ID/a/diff", "/ID/diff"] {
            assert!(
                matches!(
                    read(&line(other), "/d/overlay2/ID/merged"),
                    Err(OverlayError::Relative { .. })
                ),
                "{other}"
            );
        }
    }

    #[test]
    fn escapes_of_the_list_and_of_overlayfs_are_told_apart() {
        assert_eq!(plain(b"a\\040b\\134c\\9"), "a b\\c\\9");
        // A colon in a layer's name, and a comma that mountinfo escapes.
        let overlay = read(
            r"1 2 0:3 / /m ro - overlay o ro,lowerdir=/a\134:b:/c\054d",
            "/m",
        )
        .unwrap();
        assert_eq!(overlay.mount.options, ["ro", r"lowerdir=/a\:b:/c,d", "ro"]);
        assert_eq!(overlay.work, None);
    }

    #[test]
    fn what_is_no_whole_overlay_is_left_alone() {
        for line in [
            "1 2 0:3 / /m rw - ext4 /dev/vda rw",
            "1 2 0:3 /sub /m rw - overlay overlay rw,lowerdir=/a:/b",
            "1 2 0:3 / /other rw - overlay overlay rw,lowerdir=/a:/b",
        ] {
            let line = Line::parse(line.as_bytes()).unwrap();
            assert!(!is_overlay_at(&line, Path::new("/m")));
        }
        let added = "1 2 0:3 / /m rw - overlay overlay rw,lowerdir+=/a,datadir+=/b";
        assert!(matches!(
            read(added, "/m"),
            Err(OverlayError::Option { .. })
        ));
        assert_eq!(Overlay::at(Path::new("/proc")).unwrap(), None);
    }
}
