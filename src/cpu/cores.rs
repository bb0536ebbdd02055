//! Processors: what the machine has and what this process may use of them.

use super::memory::group_folders;
use std::collections::BTreeSet;
use std::path::Path;

/// How many there are. A processor is a hardware thread; a core may have two.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Cores {
    /// Processors in the machine.
    pub online: usize,
    /// Processors on which the system may run this process.
    pub allowed: usize,
    /// The cores that these belong to.
    pub physical: usize,
    /// The control groups' limit, in processors; `None` if there's none.
    pub quota: Option<f64>,
}

impl Cores {
    /// Counts them. What the system doesn't say is taken for as many as the standard library finds.
    pub fn count() -> Self {
        let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let here = std::thread::available_parallelism().map_or(1, |n| n.get());
        let groups = text("/proc/self/cgroup");
        let quota = group_folders(&groups, "cpu").iter().filter_map(|f| quota_of_group(f)).min_by(f64::total_cmp);
        let allowed = affinity();
        let n_allowed = allowed.as_ref().map_or(here, Vec::len);
        Cores {
            online: count_list(text("/sys/devices/system/cpu/online").trim()).unwrap_or(here),
            allowed: n_allowed,
            physical: allowed
                .and_then(|a| distinct_cores(&a, Path::new("/sys/devices/system/cpu")))
                .unwrap_or(n_allowed),
            quota,
        }
    }

    /// Threads that should compute: one a core, and no more than the control groups' limit allows. Two threads of a core share the
    /// units that multiply.
    pub fn threads(&self) -> usize {
        let limit = self.quota.map_or(usize::MAX, |q| (q as usize).max(1));
        self.physical.min(limit)
    }
}

/// `0-3,8` are five.
fn count_list(list: &str) -> Option<usize> {
    list.split(',')
        .map(|range| {
            let (from, to) = range.split_once('-').unwrap_or((range, range));
            Some((to.parse::<usize>().ok()? + 1).saturating_sub(from.parse::<usize>().ok()?))
        })
        .sum()
}

/// The cores of these processors, by what Linux tells of each: a list of the processors of its core.
fn distinct_cores(processors: &[usize], cpu: &Path) -> Option<usize> {
    let of = |i| std::fs::read_to_string(cpu.join(format!("cpu{i}/topology/thread_siblings_list"))).ok();
    let cores: BTreeSet<String> = processors.iter().map(of).collect::<Option<_>>()?;
    Some(cores.len()).filter(|&n| n > 0)
}

/// The processors on which the system may run this process.
#[cfg(any(target_os = "linux", target_os = "android"))]
fn affinity() -> Option<Vec<usize>> {
    let set = rustix::thread::sched_getaffinity(None).ok()?;
    Some((0..rustix::thread::CpuSet::MAX_CPU).filter(|&i| set.is_set(i)).collect())
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
fn affinity() -> Option<Vec<usize>> {
    None
}

/// A group's CPU limit in processors, of either version.
fn quota_of_group(folder: &Path) -> Option<f64> {
    let text = |name: &str| std::fs::read_to_string(folder.join(name)).ok();
    let (quota, period) = match text("cpu.max") {
        Some(max) => max.trim().split_once(' ').map(|(q, p)| (q.to_string(), p.to_string()))?,
        None => (text("cpu.cfs_quota_us")?, text("cpu.cfs_period_us")?),
    };
    let number = |s: &str| s.trim().parse::<f64>().ok().filter(|n| *n > 0.0);
    // "max" and -1 are no limit.
    Some(number(&quota)? / number(&period)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_and_quotas() {
        assert_eq!([count_list("0-3,8"), count_list("0"), count_list("")], [Some(5), Some(1), None]);
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        assert_eq!(quota_of_group(dir.path()), None);
        write("cpu.cfs_quota_us", "-1\n");
        write("cpu.cfs_period_us", "100000\n");
        assert_eq!(quota_of_group(dir.path()), None);
        write("cpu.cfs_quota_us", "150000\n");
        assert_eq!(quota_of_group(dir.path()), Some(1.5));
        write("cpu.max", "50000 100000\n");
        assert_eq!(quota_of_group(dir.path()), Some(0.5));
        write("cpu.max", "max 100000\n");
        assert_eq!(quota_of_group(dir.path()), None);
    }

    #[test]
    fn two_threads_of_a_core_are_one_core() {
        let dir = tempfile::tempdir().unwrap();
        // Two cores of two threads, and two that have one.
        for (i, siblings) in ["0-1", "0-1", "2-3", "2-3", "4", "5"].into_iter().enumerate() {
            let topology = dir.path().join(format!("cpu{i}/topology"));
            std::fs::create_dir_all(&topology).unwrap();
            std::fs::write(topology.join("thread_siblings_list"), format!("{siblings}\n")).unwrap();
        }
        let count = |processors: &[usize]| distinct_cores(processors, dir.path());
        assert_eq!(count(&[0, 1, 2, 3, 4, 5]), Some(4));
        assert_eq!(count(&[1, 2, 4]), Some(3));
        assert_eq!([count(&[0, 9]), count(&[])], [None, None], "nothing is made up");
    }

    #[test]
    fn threads_are_for_cores_and_within_the_limit() {
        let cores = |physical, quota| Cores { online: 16, allowed: 16, physical, quota };
        let threads = |physical, quota| cores(physical, quota).threads();
        assert_eq!(
            [threads(8, None), threads(8, Some(2.5)), threads(8, Some(0.5)), threads(2, Some(64.0))],
            [8, 2, 1, 2]
        );
        let c = Cores::count();
        assert!(1 <= c.physical && c.physical <= c.allowed && c.allowed <= c.online, "{c:?}");
    }
}
