// SPDX-License-Identifier: Apache-2.0
//! The choice of cases for each change (`--core`): what matters most, in a few minutes.

use crate::case::Setup;

/// Where the shim makes the sandbox.
const SHIM_AS_SANDBOXER: &[&str] = &[
    "oracle_planted_process_is_named",
    "lifecycle_stop_and_remove_end_a_pod",
    "lifecycle_stop_and_remove_repeated_succeed",
    "lifecycle_container_restarts_with_the_next_attempt",
    "lifecycle_exit_codes_and_reasons_are_reported",
    "lifecycle_stop_signal_is_delivered_and_grace_ends",
    "lifecycle_pods_started_together_all_run",
    "pod_hostname_and_its_files_are_set",
    "pod_shared_memory_is_shared_and_limited",
    "pod_shared_pid_namespace_shows_its_containers",
    "pod_target_pid_namespace_shows_the_target",
    "pod_sysctls_are_set",
    "view_of_rights_is_that_of_runc",
    "view_of_devices_is_that_of_runc",
    "view_of_the_network_is_that_of_runc",
    "container_environment_arguments_and_folder_are_set",
    "container_users_and_groups_are_applied",
    "container_with_a_terminal_has_one",
    "container_entrypoint_that_cannot_run_is_refused",
    "process_orphans_are_reaped",
    "task_pause_freezes_until_resume",
    "task_processes_are_listed",
    "stats_of_a_pod_answer",
    "security_capabilities_are_added_and_dropped",
    "security_seccomp_profiles_are_applied",
    "security_privileged_container_owns_the_guest_only",
    "security_sockets_to_the_host_are_refused_to_everyone",
    "mount_volume_is_shared_with_the_host_both_ways",
    "mount_read_only_volume_cannot_be_written",
    "cgroup_out_of_memory_is_reported",
    "cgroup_limits_are_updated_in_place",
    "network_addresses_and_link_are_those_of_cni",
    "network_host_and_pod_reach_each_other",
    "exec_exit_codes_and_streams_are_kept_apart",
    "exec_commands_that_cannot_run_fail_at_once",
    "exec_timeout_kills_the_process",
    "exec_confinement_equals_that_of_init",
    "exec_large_output_arrives_whole",
    "exec_standard_input_arrives_whole_and_ends",
    "exec_by_kubernetes_client_works",
    "attach_across_a_restart_of_containerd_loses_nothing",
    "streaming_exec_keeps_input_output_and_code",
    "forward_reaches_servers_wherever_they_listen",
    "forward_to_a_closed_port_fails_at_once",
    "forward_half_closed_goes_on_to_the_end",
    "load_stopped_pod_ends_every_stream_in_order",
    "event_order_of_a_task_is_kept",
    "refusal_of_host_namespaces_names_them",
    "refusal_of_a_host_device_names_it",
    "confinement_vmm_has_no_rights",
    "fault_killed_shim_takes_its_pod_along",
    "fault_panic_of_the_guest_ends_its_pod",
    "dead_vmm_ends_every_stream",
    "hung_shim_is_killed_by_delete",
    "restart_by_sigkill_leaves_pods_running",
    "upgrade_of_podhull_leaves_pods_to_the_shims_they_have",
    "node_missing_files_are_named",
    "node_without_memory_for_the_vm_says_so",
    "node_wrong_settings_are_named_with_their_line",
    "stranger_without_the_token_gets_nowhere",
    "shim_version_and_info_are_printed",
];

/// With a pause container, on containerd 1.x.
const PAUSE_1: &[&str] = &[
    "lifecycle_stop_and_remove_end_a_pod",
    "lifecycle_stop_and_remove_repeated_succeed",
    "lifecycle_removing_a_running_pod_ends_it",
    "lifecycle_container_restarts_with_the_next_attempt",
    "lifecycle_exit_codes_and_reasons_are_reported",
    "lifecycle_created_container_is_removed_unstarted",
    "lifecycle_pods_and_containers_are_listed",
    "exec_exit_codes_and_streams_are_kept_apart",
    "exec_terminal_has_the_clients_size",
    "attach_reaches_a_running_container",
    "event_order_of_a_task_is_kept",
    "forward_reaches_servers_wherever_they_listen",
    "fault_killed_shim_takes_its_pod_along",
    "restart_by_sigkill_leaves_pods_running",
    "restart_keeps_the_exit_code_of_meanwhile",
];

/// With a pause container, on containerd 2.x.
const PAUSE_2: &[&str] = &[
    "lifecycle_stop_and_remove_end_a_pod",
    "exec_exit_codes_and_streams_are_kept_apart",
    "fault_killed_shim_takes_its_pod_along",
    "restart_by_sigkill_leaves_pods_running",
];

/// True if the case called `name` is in the choice for `setup`.
pub(crate) fn has(setup: Setup, name: &str) -> bool {
    let choice = match (setup.shim_is_sandboxer(), setup.release.is_2()) {
        (true, _) => SHIM_AS_SANDBOXER,
        (false, true) if setup.is_podhull() => PAUSE_2,
        (false, true) => SHIM_AS_SANDBOXER,
        (false, false) => PAUSE_1,
    };
    choice.contains(&name)
}

#[cfg(test)]
mod tests {
    use podhull_testkit::Release;

    use super::*;
    use crate::cases;

    #[test]
    fn every_choice_is_a_case_of_its_setup() {
        for (release, handler, choice) in [
            (Release::V2_4, "podhull-sandbox", SHIM_AS_SANDBOXER),
            (Release::V2_4, "podhull", PAUSE_2),
            (Release::Debian16, "podhull", PAUSE_1),
        ] {
            let setup = Setup { release, handler };
            for name in choice {
                let case = cases::all().into_iter().find(|case| case.name == *name);
                let there = case.is_some_and(|case| case.on.has(setup));
                assert!(there, "{name} is no case of {setup}");
            }
        }
    }
}
