// Added to gVisor's package runsc/boot/filter/config for a build from source; see
// sandbox_gateway/host/runsc_build.py.

package config

import (
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/seccomp"
	"gvisor.dev/gvisor/pkg/seccomp/precompiledseccomp"
	"gvisor.dev/gvisor/pkg/sentry/platform"
)

// SandboxGatewayPrograms compiles the system call filters of the sandboxes that sandbox_gateway makes, as
// PrecompiledPrograms does for all that gVisor's releases support. What a sandbox would compute for itself when it
// starts is compared with each: an error where it is not the same, instruction by instruction.
func SandboxGatewayPrograms() ([]precompiledseccomp.Program, error) {
	options, err := optionsToPrecompile()
	if err != nil {
		return nil, err
	}
	var programs []precompiledseccomp.Program
	for _, option := range options {
		if !ofOurSandboxes(option) {
			continue
		}
		program, err := compiled(option)
		if err != nil {
			return nil, err
		}
		programs = append(programs, program)
	}
	return programs, nil
}

func ofOurSandboxes(option Options) bool {
	special := option.HostNetwork || option.NVProxy || option.TPUProxy || option.RDMAProxy
	return option.Platform.ConfigKey() == "systrap" && !special
}

func compiled(option Options) (precompiledseccomp.Program, error) {
	var names []string
	for name := range option.Vars() {
		names = append(names, name)
	}
	general := option
	general.Platform = ownSignals{option.Platform}
	program, err := precompiledseccomp.Precompile(
		option.ConfigKey(), names, func(values precompiledseccomp.Values) *seccomp.Program {
			return filter(general, values)
		})
	if err != nil {
		return program, err
	}
	wanted, _, err := filter(option, option.Vars()).Build()
	if err != nil {
		return program, err
	}
	filled := program
	filled.Bytecode32 = slices.Clone(program.Bytecode32)
	found, err := filled.RenderInstructions(option.Vars())
	if err != nil {
		return program, err
	}
	if !slices.Equal(found, wanted) {
		return program, fmt.Errorf("the filter compiled for %s is not the one that a sandbox computes", option.ConfigKey())
	}
	return program, nil
}

func filter(option Options, values precompiledseccomp.Values) *seccomp.Program {
	allowed, denied := rules(option, values)
	return &seccomp.Program{
		RuleSets: []seccomp.RuleSet{{Rules: denied.Copy()}, {Rules: allowed.Copy(), Action: seccomp.Allow}},
		Options:  SeccompOptions(option),
	}
}

// ownSignals has the process id of the sandbox where the platform's rules take that of the process that asks for
// them, which here is the compiler's.
type ownSignals struct {
	platform.SeccompInfo
}

// SyscallFilters implements platform.SeccompInfo.SyscallFilters.
func (own ownSignals) SyscallFilters(values precompiledseccomp.Values) seccomp.SyscallRules {
	rules := own.SeccompInfo.SyscallFilters(values)
	rules.Remove(unix.SYS_RT_TGSIGQUEUEINFO)
	return rules.Add(unix.SYS_RT_TGSIGQUEUEINFO, seccomp.PerArg{
		seccomp.EqualTo(values.GetUint64(selfPIDVarName)),
		seccomp.AnyValue{},
		seccomp.EqualTo(unix.SIGKILL),
	})
}
