//! What the test asks for, on the kernel's command line.

/// What the guest is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// The word after `hostile=`: a device, or `calm`.
    pub role: Role,
    /// The number after `seed=`.
    pub seed: u64,
    /// The number after `rounds=`.
    pub rounds: u64,
}

/// What to attack, if anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The socket device.
    Vsock,
    /// The file system device.
    Fs,
    /// The entropy device.
    Rng,
    /// The console device.
    Console,
    /// A network device.
    Net,
    /// The I/O APIC, ports, and what lies between devices.
    Platform,
    /// Nothing: the guest uses its devices as it should and checks what they do.
    Calm,
}

impl Role {
    const NAMES: [(&str, Self); 7] = [
        ("vsock", Self::Vsock),
        ("fs", Self::Fs),
        ("rng", Self::Rng),
        ("console", Self::Console),
        ("net", Self::Net),
        ("platform", Self::Platform),
        ("calm", Self::Calm),
    ];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        let name = Self::NAMES.iter().find(|(_, role)| *role == self);
        name.map_or("", |(name, _)| name)
    }
}

impl Options {
    /// Reads the command line, of which the last word of a kind counts.
    pub fn parse(line: &[u8]) -> Option<Self> {
        let mut options = Self {
            role: Role::Calm,
            seed: 0,
            rounds: 0,
        };
        let mut known = false;
        for word in line.split(|byte| *byte == b' ') {
            let Some((key, value)) = core::str::from_utf8(word).ok()?.split_once('=') else {
                continue;
            };
            match key {
                "hostile" => {
                    let role = Role::NAMES.iter().find(|(name, _)| *name == value);
                    options.role = role?.1;
                    known = true;
                }
                "seed" => options.seed = value.parse().ok()?,
                "rounds" => options.rounds = value.parse().ok()?,
                _ => {}
            }
        }
        known.then_some(options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_words_of_the_command_line_count() {
        let line = b"quiet console=hvc0 hostile=rng seed=5 rounds=70 hostile=fs";
        let options = Options {
            role: Role::Fs,
            seed: 5,
            rounds: 70,
        };
        assert_eq!(Options::parse(line), Some(options));
        assert_eq!(options.role.name(), "fs");
        assert_eq!(Options::parse(b"seed=5"), None);
        assert_eq!(Options::parse(b"hostile=disk"), None);
    }
}
