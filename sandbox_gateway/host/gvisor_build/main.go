// Writes gVisor's file of system call filters that were compiled in advance, which the sources come without; see
// sandbox_gateway/host/runsc_build.py.
//
// Usage: go run . path/to/runsc/boot/filter/filter_precompiled.go
package main

import (
	"log"
	"os"
	"strings"

	"gvisor.dev/gvisor/runsc/boot/filter/config"
)

const (
	disabled = "PrecompilationDisabledAtBuildTime = true"
	enabled  = "PrecompilationDisabledAtBuildTime = false"
	end      = "\tprecompiledPrograms = programs\n"
)

func main() {
	log.SetFlags(0)
	path := os.Args[1]
	programs, err := config.SandboxGatewayPrograms()
	if err != nil {
		log.Fatal(err)
	}
	before, err := os.ReadFile(path)
	if err != nil {
		log.Fatal(err)
	}
	text := string(before)
	if len(programs) == 0 || strings.Count(text, disabled) != 1 || strings.Count(text, end) != 1 {
		log.Fatalf("%s is not as expected", path)
	}
	var registered strings.Builder
	for _, program := range programs {
		registered.WriteString(program.Registration("\t", "precompiledseccomp", "programs"))
	}
	text = strings.Replace(text, disabled, enabled, 1)
	text = strings.Replace(text, end, registered.String()+end, 1)
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		log.Fatal(err)
	}
}
