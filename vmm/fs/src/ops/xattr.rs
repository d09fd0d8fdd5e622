//! Extended attributes: SETXATTR, GETXATTR, LISTXATTR and REMOVEXATTR.
//!
//! The calls on a descriptor refuse `O_PATH`, and those on a path know no directory. So they get
//! the name of the magic link alone: the thread's working directory is `/proc/self/fd`. Following
//! the magic link ends at the file itself, even if that is a symbolic link.

use std::ffi::CStr;

use rustix::{
    fs::{Mode, XattrFlags, getxattr, listxattr, removexattr, setxattr},
    io::Errno,
};

use crate::{
    FileServer,
    abi::{NAME_MAX, ROOT_ID, Reader, SETXATTR_ACL_KILL_SGID, Writer, XATTR_MAX},
    reply::Answer,
    request::Header,
    thread::magic_link,
};

impl FileServer {
    /// `struct fuse_setxattr_in`, name, value.
    pub(crate) fn setxattr(&self, header: &Header, body: &mut Reader<'_>) -> Result<Answer, Errno> {
        let size = usize::try_from(body.u32()?).map_err(|_| Errno::INVAL)?;
        let flags = XattrFlags::from_bits(body.u32()?).ok_or(Errno::INVAL)?;
        let setxattr_flags = body.u32()?;
        let _ = body.u32()?;
        let name = xattr_name(body)?;
        if size > XATTR_MAX {
            return Err(Errno::TOOBIG);
        }
        let value = body.bytes(size)?;
        let inode = self.inodes.get(header.node)?;
        inode.writable()?;
        setxattr(magic_link(&*inode), name, value, flags)?;
        if setxattr_flags & SETXATTR_ACL_KILL_SGID != 0 {
            // The host would keep the bit, since it asks whether the server is of the file's group.
            let mode = Mode::from_raw_mode(inode.stat()?.stx_mode.into());
            if mode.contains(Mode::SGID) {
                self.change_mode(&inode, mode.difference(Mode::SGID).as_raw_mode())?;
            }
        }
        Ok(Answer::Empty)
    }

    /// `struct fuse_getxattr_in`, name. A size of 0 asks for the size.
    pub(crate) fn getxattr(&self, header: &Header, body: &mut Reader<'_>) -> Result<Answer, Errno> {
        let size = body.u32()?;
        let _ = body.u32()?;
        let name = xattr_name(body)?;
        if header.node == ROOT_ID {
            return Err(Errno::NODATA);
        }
        let inode = self.inodes.get(header.node)?;
        let path = magic_link(&*inode);
        let value = sized(size, |value| getxattr(path, name, value));
        if value
            .as_ref()
            .is_err_and(|errno| *errno == Errno::OPNOTSUPP)
            && name.to_bytes().starts_with(b"system.posix_acl_")
        {
            // A file system of the host without ACLs. The guest asks for the ACL to check a
            // permission, and would take the error for the result of the check.
            return Err(Errno::NODATA);
        }
        value
    }

    /// `struct fuse_getxattr_in`. A size of 0 asks for the size.
    pub(crate) fn listxattr(
        &self,
        header: &Header,
        body: &mut Reader<'_>,
    ) -> Result<Answer, Errno> {
        let size = body.u32()?;
        if header.node == ROOT_ID {
            return sized(size, |_| Ok(0));
        }
        let inode = self.inodes.get(header.node)?;
        let path = magic_link(&*inode);
        sized(size, |list| listxattr(path, list))
    }

    pub(crate) fn removexattr(
        &self,
        header: &Header,
        body: &mut Reader<'_>,
    ) -> Result<Answer, Errno> {
        let name = xattr_name(body)?;
        let inode = self.inodes.get(header.node)?;
        inode.writable()?;
        removexattr(magic_link(&*inode), name)?;
        Ok(Answer::Empty)
    }
}

fn xattr_name<'a>(body: &mut Reader<'a>) -> Result<&'a CStr, Errno> {
    let name = body.string()?;
    match name.count_bytes() {
        0 => Err(Errno::INVAL),
        1..=NAME_MAX => Ok(name),
        _ => Err(Errno::RANGE),
    }
}

/// Answers with what `fill` puts into a buffer of `size` bytes, or, for size 0, with
/// `struct fuse_getxattr_out`: how many bytes it would be.
fn sized(size: u32, fill: impl FnOnce(&mut [u8]) -> Result<usize, Errno>) -> Result<Answer, Errno> {
    let capacity = match usize::try_from(size) {
        Ok(0) | Err(_) => XATTR_MAX,
        Ok(size) => size.min(XATTR_MAX),
    };
    let mut buffer = vec![0; capacity];
    let length = fill(&mut buffer)?;
    buffer.truncate(length);
    if size == 0 {
        let length = u32::try_from(length).map_err(|_| Errno::RANGE)?;
        return Ok(Writer::default().u32(length).u32(0).into());
    }
    Ok(Answer::Body(buffer))
}
