module ngrokd.example/bench

go 1.25
