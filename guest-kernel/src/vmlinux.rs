//! What can be read from a kernel image itself.

use std::io::BufRead;

/// The release of the kernel in an ELF image, as `uname -r` prints it, read from its banner
/// (`Linux version RELEASE (…`). `None` when the image is not an x86-64 ELF file with a banner.
pub fn release(image: &[u8]) -> Option<String> {
    const EM_X86_64: u8 = 62;
    const LONGEST: usize = 64;

    let is_elf64 = image.starts_with(b"\x7fELF\x02\x01") && image.get(18) == Some(&EM_X86_64);
    if !is_elf64 {
        return None;
    }
    let mut rest = image;
    while rest.skip_until(b'L').ok()? > 0 {
        let Some(after) = rest.strip_prefix(b"inux version ") else {
            continue;
        };
        // The banner proper is the occurrence followed by a release; others are format strings.
        let end = after.iter().take(LONGEST).position(|&byte| byte == b' ');
        let release = end.and_then(|end| std::str::from_utf8(&after[..end]).ok());
        if let Some(release) = release.filter(|name| name.starts_with(|c: char| c.is_ascii_digit()))
        {
            return Some(release.to_owned());
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(contents: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 64];
        image[..6].copy_from_slice(b"\x7fELF\x02\x01");
        image[18] = 62;
        image.extend_from_slice(contents);
        image
    }

    #[test]
    fn release_is_read_from_the_banner() {
        let banner = b"..Linux version \xff Linux version %s (%s)\0..Linux version 6.12.1-bulkhead (a@b) (gcc) #1";
        assert_eq!(release(&image(banner)), Some("6.12.1-bulkhead".to_owned()));
    }

    #[test]
    fn what_is_not_a_kernel_has_no_release() {
        assert_eq!(release(b""), None);
        assert_eq!(release(b"Linux version 6.12.1 ("), None);
        assert_eq!(release(&image(b"no banner")), None);
        assert_eq!(release(&image(b"Linux version 6")), None);
        assert_eq!(release(&image(b"Linux version ")), None);
        let mut arm = image(b"Linux version 6.12.1 (");
        arm[18] = 183;
        assert_eq!(release(&arm), None);
    }
}
