//! Finds what a BPF object must not contain: calls into `core::panicking`. Reads the few parts of ELF64 that takes
//! (<https://refspecs.linuxfoundation.org/elf/gabi4+/contents.html>), so that no binutils are needed.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};

/// `core::panicking`, in either mangling.
const PANICKING: &str = "9panicking";
const SHT_SYMTAB: u32 = 2;
const SHT_REL: u32 = 9;
const STT_FUNC: u8 = 2;
const STT_SECTION: u8 = 3;

/// One sentence per function that calls a panicking one, or per panicking function when no caller is found. Empty for an
/// object that is fit to load.
pub(super) fn panicking(elf: &[u8]) -> Result<Vec<String>> {
    let elf = Elf::parse(elf)?;
    let symbols = elf.symbols()?;
    let panicking: Vec<_> = symbols.iter().filter(|symbol| symbol.name.contains(PANICKING)).collect();
    let mut found = BTreeSet::new();
    for callee in &panicking {
        let callers = elf.callers(callee, &symbols)?;
        found.extend(callers.into_iter().map(|caller| format!("{caller} calls {}", callee.name)));
    }
    if found.is_empty() {
        found.extend(panicking.iter().map(|symbol| format!("{} is linked in", symbol.name)));
    }
    Ok(found.into_iter().collect())
}

struct Elf<'a> {
    bytes: &'a [u8],
    sections: Vec<Section>,
}

struct Section {
    kind: u32,
    offset: u64,
    size: u64,
    link: u32,
    info: u32,
}

struct Symbol {
    name: String,
    kind: u8,
    section: u16,
    value: u64,
}

impl<'a> Elf<'a> {
    fn parse(bytes: &'a [u8]) -> Result<Self> {
        let host_order = if cfg!(target_endian = "big") { 2 } else { 1 };
        ensure!(
            bytes.get(..6) == Some(&[0x7F, b'E', b'L', b'F', 2, host_order]),
            "not a 64-bit ELF object of this machine's byte order"
        );
        let mut elf = Self { bytes, sections: Vec::new() };
        let table = elf.number::<8>(40)?;
        let entry = elf.number::<2>(58)?;
        for index in 0..elf.number::<2>(60)? {
            let at = table + index * entry;
            let section = Section {
                kind: elf.number::<4>(at + 4)? as u32,
                offset: elf.number::<8>(at + 24)?,
                size: elf.number::<8>(at + 32)?,
                link: elf.number::<4>(at + 40)? as u32,
                info: elf.number::<4>(at + 44)? as u32,
            };
            elf.sections.push(section);
        }
        Ok(elf)
    }

    fn symbols(&self) -> Result<Vec<Symbol>> {
        let Some(table) = self.sections.iter().find(|section| section.kind == SHT_SYMTAB) else {
            return Ok(Vec::new());
        };
        let names = self.sections.get(table.link as usize).context("the symbols have no names")?;
        (0..table.size / 24)
            .map(|index| {
                let at = table.offset + index * 24;
                Ok(Symbol {
                    name: self.text(names.offset + self.number::<4>(at)?)?,
                    kind: self.number::<1>(at + 4)? as u8 & 0xF,
                    section: self.number::<2>(at + 6)? as u16,
                    value: self.number::<8>(at + 8)?,
                })
            })
            .collect()
    }

    /// Functions in other sections that call the given one.
    fn callers(&self, callee: &Symbol, symbols: &[Symbol]) -> Result<BTreeSet<String>> {
        let mut callers = BTreeSet::new();
        for table in self.sections.iter().filter(|section| section.kind == SHT_REL) {
            let Some(code) = self.sections.get(table.info as usize) else { continue };
            for index in 0..table.size / 16 {
                let at = table.offset + index * 16;
                let offset = self.number::<8>(at)?;
                let target = self.number::<8>(at + 8)? >> 32;
                let Some(target) = symbols.get(usize::try_from(target)?) else { continue };
                if target.section != callee.section
                    || self.called(code, offset, target)? != Some(callee.value)
                {
                    continue;
                }
                let caller = symbols
                    .iter()
                    .filter(|s| s.kind == STT_FUNC && u32::from(s.section) == table.info && s.value <= offset)
                    .max_by_key(|s| s.value);
                callers.extend(caller.map(|symbol| symbol.name.clone()));
            }
        }
        Ok(callers)
    }

    /// Where in its section the target of a relocated call lies. A call to a local function is relocated against the
    /// section, and the instruction says how many instructions of 8 bytes into it, less one
    /// (<https://docs.kernel.org/bpf/llvm_reloc.html>).
    fn called(&self, code: &Section, offset: u64, target: &Symbol) -> Result<Option<u64>> {
        match target.kind {
            STT_FUNC => Ok(Some(target.value)),
            STT_SECTION if offset < code.size => {
                let distance = self.number::<4>(code.offset + offset + 4)? as u32;
                Ok(Some((u64::from(distance.wrapping_add(1))) * 8))
            }
            _ => Ok(None),
        }
    }

    /// An unsigned number of `N` bytes.
    fn number<const N: usize>(&self, at: u64) -> Result<u64> {
        let at = usize::try_from(at)?;
        let bytes =
            at.checked_add(N).and_then(|end| self.bytes.get(at..end)).context("the object is cut short")?;
        let mut wide = [0; 8];
        if cfg!(target_endian = "big") {
            wide[8 - N..].copy_from_slice(bytes);
        } else {
            wide[..N].copy_from_slice(bytes);
        }
        Ok(u64::from_ne_bytes(wide))
    }

    fn text(&self, at: u64) -> Result<String> {
        let rest = self.bytes.get(usize::try_from(at)?..).context("a name lies outside the object")?;
        let end = rest.iter().position(|b| *b == 0).context("a name does not end")?;
        Ok(String::from_utf8_lossy(&rest[..end]).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_object_is_refused_in_words() {
        assert!(panicking(b"").is_err());
        assert!(panicking(b"\x7fELF\x02\x01").unwrap_err().to_string().contains("cut short"));
    }

    #[test]
    fn this_very_test_binary_can_panic() {
        let own = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let found = panicking(&own).unwrap();
        assert!(found.iter().any(|line| line.contains(PANICKING)), "{found:?}");
    }
}
