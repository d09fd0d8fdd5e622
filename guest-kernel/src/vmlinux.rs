//! What can be read from a kernel image itself.

/// The release of the kernel in an ELF image, as `uname -r` prints it, read from its banner
/// (`Linux version RELEASE (…`). `None` when the image is not an x86-64 ELF file with a banner.
pub fn release(image: &[u8]) -> Option<String> {
    const BANNER: &[u8] = b"Linux version ";
    const EM_X86_64: u8 = 62;
    const LONGEST: usize = 64;

    let is_elf64 = image.starts_with(b"\x7fELF\x02\x01") && image.get(18) == Some(&EM_X86_64);
    if !is_elf64 {
        return None;
    }
    // The banner proper is the occurrence followed by a release; others are format strings.
    image
        .windows(BANNER.len())
        .enumerate()
        .filter(|(_, window)| *window == BANNER)
        .find_map(|(at, _)| {
            let rest = &image[at + BANNER.len()..];
            let end = rest.iter().take(LONGEST).position(|&byte| byte == b' ')?;
            let release = std::str::from_utf8(&rest[..end]).ok()?;
            release
                .starts_with(|first: char| first.is_ascii_digit())
                .then(|| release.to_owned())
        })
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
        let banner = b"..Linux version %s (%s)\0..Linux version 6.12.1-bulkhead (a@b) (gcc) #1";
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
