//! The operations, by what they are about.

mod attr;
mod create;
mod dir;
mod entry;
mod file;
mod link;
mod lookup;
mod xattr;
