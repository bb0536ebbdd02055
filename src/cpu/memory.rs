//! How much memory this process may take: what the machine can spare, and what its control group allows.

use std::path::{Path, PathBuf};

/// What bounds the memory that can be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// The system's memory.
    System,
    /// A control group's limit.
    Group,
}

impl std::fmt::Display for Bound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Bound::System => "what the system can spare",
            Bound::Group => "what a control group leaves",
        })
    }
}

/// Bytes that could be taken now without pushing others out, and what bounds them: the least of the system's `MemAvailable` and what is
/// left of every memory limit of the control groups (version 1 and 2) that this process is in. `None` where neither is known.
pub fn bounded() -> Option<(u64, Bound)> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok().and_then(|t| mem_available(&t));
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limits = group_folders(&groups, "memory").into_iter().filter_map(|f| left_in_group(&f));
    meminfo.map(|n| (n, Bound::System)).into_iter().chain(limits.map(|n| (n, Bound::Group))).min()
}

/// The bytes of [`bounded`].
pub fn available() -> Option<u64> {
    bounded().map(|b| b.0)
}

/// Bytes that may be taken for a moment to measure something with: `most`, or half of what could be taken. `None` if that's less than
/// `least`, with which a measurement would mean nothing.
pub fn for_measuring(least: u64, most: u64) -> Option<u64> {
    let n = available().map_or(most, |n| most.min(n / 2));
    (n >= least).then_some(n)
}

/// Bytes of memory that this process holds now; `None` where the system doesn't say.
pub fn resident() -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    Some(statm.split_whitespace().nth(1)?.parse::<u64>().ok()? * rustix::param::page_size() as u64)
}

/// The most bytes of memory that this process has held; `None` where the system doesn't say.
pub fn peak() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

/// This process's page faults that had to read from a disk; `None` where the system doesn't say.
pub fn major_faults() -> Option<u64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The 12th field, counted behind the program's name, which may hold anything.
    stat.rsplit_once(')')?.1.split_whitespace().nth(9)?.parse().ok()
}

fn mem_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// The folders of this process's groups for a controller and of those above them.
pub(super) fn group_folders(cgroup: &str, controller: &str) -> Vec<PathBuf> {
    let mut folders = Vec::new();
    for line in cgroup.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(id), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else { continue };
        let root = match (id, controllers) {
            ("0", "") => PathBuf::from("/sys/fs/cgroup"),
            (_, c) if c.split(',').any(|c| c == controller) => Path::new("/sys/fs/cgroup").join(controller),
            _ => continue,
        };
        let own = root.join(path.trim_start_matches('/'));
        folders.extend(own.ancestors().take_while(|f| f.starts_with(&root)).map(Path::to_path_buf));
    }
    folders
}

/// The tightest memory limit of this process's control groups, in bytes.
pub fn group_limit() -> Option<u64> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    group_folders(&groups, "memory").iter().filter_map(|f| limit_of_group(f)).min()
}

/// A group's limit, of either version; `None` if it has none.
fn limit_of_group(folder: &Path) -> Option<u64> {
    let number = |name: &str| std::fs::read_to_string(folder.join(name)).ok()?.trim().parse::<u64>().ok();
    // Version 1 says "no limit" with a number near 2^63.
    number("memory.max").or_else(|| number("memory.limit_in_bytes")).filter(|&n| n < 1 << 60)
}

/// What is left of a group's limit; the page cache counts as free, since the kernel takes it back first.
fn left_in_group(folder: &Path) -> Option<u64> {
    let number = |name: &str| std::fs::read_to_string(folder.join(name)).ok()?.trim().parse::<u64>().ok();
    let stat = std::fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
    let cache = |key: &str| stat.lines().find_map(|l| l.strip_prefix(key)?.trim().parse::<u64>().ok()).unwrap_or(0);
    let (limit, used) = match number("memory.max") {
        Some(limit) => (limit, number("memory.current")?.saturating_sub(cache("file "))),
        None => (number("memory.limit_in_bytes")?, number("memory.usage_in_bytes")?.saturating_sub(cache("cache "))),
    };
    // Version 1 says "no limit" with a number near 2^63.
    (limit < 1 << 60).then(|| limit.saturating_sub(used))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_system_writes() {
        assert_eq!(mem_available("MemTotal: 9 kB\nMemAvailable:   24 kB\n"), Some(24 * 1024));
        assert_eq!(mem_available("MemAvailable: lots\n"), None);
        let folders = group_folders("5:cpu,cpuacct:/a\n4:memory:/x/y\n0::/u\nnonsense\n", "memory");
        let want = [
            "/sys/fs/cgroup/memory/x/y",
            "/sys/fs/cgroup/memory/x",
            "/sys/fs/cgroup/memory",
            "/sys/fs/cgroup/u",
            "/sys/fs/cgroup",
        ];
        assert_eq!(folders, want.map(PathBuf::from));
    }

    #[test]
    fn a_group_s_limit_counts_without_its_page_cache() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        assert_eq!(left_in_group(dir.path()), None);
        write("memory.limit_in_bytes", "1000\n");
        write("memory.usage_in_bytes", "700\n");
        write("memory.stat", "cache 300\nrss 400\n");
        assert_eq!(left_in_group(dir.path()), Some(600));
        write("memory.limit_in_bytes", "9223372036854771712\n");
        assert_eq!(left_in_group(dir.path()), None);
        write("memory.max", "5000\n");
        write("memory.current", "4000\n");
        write("memory.stat", "anon 1\nfile 500\n");
        assert_eq!(left_in_group(dir.path()), Some(1500));
        write("memory.max", "max\n");
        assert_eq!(left_in_group(dir.path()), None, "no limit in version 2; the other version's says none too");
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_machine_has_some() {
        assert!(available().unwrap() > 1 << 20);
        assert!(peak().unwrap() >= resident().unwrap() / 2 && major_faults().is_some());
    }
}
