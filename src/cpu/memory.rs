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

/// The number in one of a group's files.
fn number(folder: &Path, name: &str) -> Option<u64> {
    std::fs::read_to_string(folder.join(name)).ok()?.trim().parse().ok()
}

/// A group's limit, of either version; `None` if it has none. Above `memory.high` a process is slowed down until it hardly moves.
fn limit_of_group(folder: &Path) -> Option<u64> {
    let limits = ["memory.max", "memory.high", "memory.limit_in_bytes"];
    // Version 1 says "no limit" with a number near 2^63.
    limits.iter().filter_map(|name| number(folder, name)).filter(|&n| n < 1 << 60).min()
}

/// What is left of a group's limit. The page cache of files counts as free, since the kernel takes it back first; what it can't drop
/// doesn't: shared memory and tmpfs (`file` and `cache` include them) and locked pages aren't on the lists of files' pages.
fn left_in_group(folder: &Path) -> Option<u64> {
    let limit = limit_of_group(folder)?;
    // Version 1 counts the groups below in the usage, but only with `total_` in the statistics.
    let (used, lists) = match number(folder, "memory.current") {
        Some(used) => (used, ["inactive_file ", "active_file "]),
        None => (number(folder, "memory.usage_in_bytes")?, ["total_inactive_file ", "total_active_file "]),
    };
    let stat = std::fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
    let of_list = |key: &str| stat.lines().find_map(|l| l.strip_prefix(key)?.trim().parse::<u64>().ok()).unwrap_or(0);
    let droppable = lists.into_iter().map(of_list).fold(0, u64::saturating_add);
    Some(limit.saturating_sub(used.saturating_sub(droppable)))
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

    /// A group's folder with these files.
    fn group(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        files.iter().for_each(|(name, text)| std::fs::write(dir.path().join(name), text).unwrap());
        dir
    }

    #[test]
    fn a_group_s_limit_counts_without_what_the_kernel_can_drop() {
        let left = |files: &[(&str, &str)]| left_in_group(group(files).path());
        assert_eq!(left(&[]), None);
        // Of 500 bytes of cache 200 are shared memory: they stay. The numbers without `total_` leave out the groups below.
        let stat = "cache 5\nshmem 0\ninactive_file 5\nactive_file 0\nunevictable 0\n\
                    total_cache 500\ntotal_shmem 200\ntotal_inactive_file 100\ntotal_active_file 150\ntotal_unevictable 50\n";
        let version_1 =
            |limit| [("memory.limit_in_bytes", limit), ("memory.usage_in_bytes", "700\n"), ("memory.stat", stat)];
        assert_eq!(left(&version_1("1000\n")), Some(550));
        assert_eq!(left(&version_1("9223372036854771712\n")), None);
        let stat = "anon 1\nfile 500\nshmem 200\ninactive_file 100\nactive_file 150\nunevictable 50\n";
        let version_2 = |max, high| {
            [("memory.max", max), ("memory.high", high), ("memory.current", "4000\n"), ("memory.stat", stat)]
        };
        assert_eq!(left(&version_2("5000\n", "max\n")), Some(1250));
        assert_eq!(left(&version_2("max\n", "max\n")), None);
    }

    #[test]
    fn memory_high_is_a_limit_like_memory_max() {
        let limits = |max, high| {
            let dir = group(&[("memory.max", max), ("memory.high", high), ("memory.current", "100\n")]);
            (limit_of_group(dir.path()), left_in_group(dir.path()))
        };
        assert_eq!(limits("5000\n", "3000\n"), (Some(3000), Some(2900)));
        assert_eq!(limits("2000\n", "3000\n"), (Some(2000), Some(1900)));
        assert_eq!(limits("max\n", "3000\n"), (Some(3000), Some(2900)));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_machine_has_some() {
        assert!(available().unwrap() > 1 << 20);
        assert!(peak().unwrap() >= resident().unwrap() / 2 && major_faults().is_some());
    }
}
