# fish completion for fdbroker-scand
# Written by `make completions`, of what the program says of itself. Runs nothing.

# Whether the words before the cursor lead to this command.
function __fdbroker_scand_is
    set -l command fdbroker-scand
    set -l option
    for word in (commandline -opc)[2..]
        if test -n "$option"
            set option
        else if contains -- $word --config --ready-fd
            set option $word
        else if contains -- "$command $word" 'fdbroker-scand import-clamd-conf'
            set command "$command $word"
        else if not string match -q -- '-*' $word
            break
        end
    end
    test "$command" = "$argv[1]"
end

complete -c fdbroker-scand -f
complete -c fdbroker-scand -n '__fdbroker_scand_is "fdbroker-scand"' -a import-clamd-conf -d 'Translate a clamd.conf into a scand.yaml'
complete -c fdbroker-scand -n '__fdbroker_scand_is "fdbroker-scand"' -l config -r -F -d 'What it is to do'
complete -c fdbroker-scand -n '__fdbroker_scand_is "fdbroker-scand"' -l check -d 'Say what is wrong with the configuration, and end'
complete -c fdbroker-scand -n '__fdbroker_scand_is "fdbroker-scand"' -l dev -d 'For trying: who starts it may own the configuration, too'
complete -c fdbroker-scand -n '__fdbroker_scand_is "fdbroker-scand"' -l ready-fd -x -d 'Write \'ready\' here when the engines are loaded, and close it: for supervisors like s6'
complete -c fdbroker-scand -n '__fdbroker_scand_is "fdbroker-scand"' -l version -d 'Show the version and exit'
complete -c fdbroker-scand -n '__fdbroker_scand_is "fdbroker-scand"' -s h -l help -d 'Show this message and exit'
complete -c fdbroker-scand -n '__fdbroker_scand_is "fdbroker-scand import-clamd-conf"' -F
complete -c fdbroker-scand -n '__fdbroker_scand_is "fdbroker-scand import-clamd-conf"' -s v -l verbose -d 'List also what holds without any option'
complete -c fdbroker-scand -n '__fdbroker_scand_is "fdbroker-scand import-clamd-conf"' -s h -l help -d 'Show this message and exit'
